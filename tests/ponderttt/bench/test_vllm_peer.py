"""The line to vLLM, with a worker that only pretends; and vLLM's environment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ponderttt.bench import vllm_env
from ponderttt.bench.vllm_peer import VllmPeer
from ponderttt.errors import PonderError, UnavailableError

WORKER = """
import json, os, sys
threads = int(os.environ["OMP_NUM_THREADS"])
print(json.dumps({"threads": threads, "arguments": sys.argv[1:]}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["tokens"] == 13:
        print("no luck", file=sys.stderr)
        sys.exit(1)
    tokens = [[len(p)] * request["tokens"] for p in request["prompts"]]
    print(json.dumps({"seconds": 0.5, "tokens": tokens}), flush=True)
"""


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[VllmPeer]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    started = VllmPeer(tmp_path, 3, 2048, [sys.executable, str(script)])
    yield started
    started.close()


def test_worker_gets_threads_directory_and_length(peer: VllmPeer, tmp_path: Path) -> None:
    assert peer.generate([[1, 2], [3]], 2) == (0.5, [[2, 2], [1, 1]])
    assert peer.generate([[1]], 1) == (0.5, [[1]])
    assert peer.facts == {"threads": 3, "arguments": [str(tmp_path), "2048", "eager"]}


def test_worker_that_dies_is_reported_with_its_last_words_and_started_again(peer: VllmPeer) -> None:
    with pytest.raises(UnavailableError, match="no luck"):
        peer.generate([[1]], 13)
    assert peer.generate([[1]], 1) == (0.5, [[1]])


def test_close_may_be_repeated(peer: VllmPeer) -> None:
    peer.generate([[1]], 1)
    peer.close()
    peer.close()


def test_environment_that_is_missing_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"python -m ponderttt\.bench\.vllm_env"):
        VllmPeer(tmp_path, 1, 2048).generate([[1]], 1)


def test_environment_is_made_once_without_the_packages_that_break_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands: list[list[str]] = []

    def record(command: list[str]) -> None:
        commands.append(command)
        vllm_env.directory().mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(vllm_env, "_run", record)
    assert vllm_env.make() == vllm_env.python()
    made, installed, uninstalled = commands
    assert made == [sys.executable, "-m", "venv", str(vllm_env.directory())]
    assert installed[-1] == vllm_env.REQUIREMENT
    assert set(vllm_env.UNWANTED) <= set(uninstalled)
    vllm_env.make()
    assert len(commands) == 3


def test_environment_that_is_half_made_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    leftover = vllm_env.directory() / "leftover"
    leftover.parent.mkdir(parents=True)
    leftover.touch()

    def fail(command: list[str]) -> None:
        raise PonderError("no network")

    monkeypatch.setattr(vllm_env, "_run", fail)
    with pytest.raises(PonderError, match="no network"):
        vllm_env.make()
    assert not leftover.exists()
    with pytest.raises(UnavailableError):
        vllm_env.python()


def test_worker_imports_nothing_of_ours() -> None:
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1], run_name='worker'); "
        "sys.exit('ponderttt' in sys.modules)"
    )
    worker = Path(vllm_env.__file__).with_name("vllm_worker.py")
    subprocess.run([sys.executable, "-P", "-c", code, str(worker)], check=True)
