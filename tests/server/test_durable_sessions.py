"""Sessions over HTTP with a store: restarts, earlier versions, two servers, broken stores."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from ponderttt.sessions.files import LocalFiles
from tests.helpers import source_text
from tests.server.live import PROMPT, Live, live_server

ROOT = Path(__file__).parents[2]
COMMAND = "import typer\nfrom server.cli import serve\ntyper.run(serve)"
TEXT = source_text()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where sessions are kept."""
    return tmp_path / "sessions"


@pytest.fixture
def durable(tiny_llama_dir: Path, place: Path) -> Iterator[Live]:
    """A server that saves at once."""
    with live_server(tiny_llama_dir, sessions=str(place), session_write_delay=0.0) as server:
        yield server


def error(answer: httpx.Response) -> dict[str, Any]:
    detail: dict[str, Any] = answer.json()["error"]
    return detail


def saved(live: Live, name: str) -> dict[str, Any]:
    """A session's state, once all of it is in the store."""
    until = time.monotonic() + 20
    while True:
        state = live.session(name)
        if state["kept_versions"] and state["kept_versions"][-1] == state["version"]:
            return state
        assert time.monotonic() < until, state
        time.sleep(0.02)


def test_sessions_survive_a_restart(tiny_llama_dir: Path, place: Path) -> None:
    with live_server(tiny_llama_dir, sessions=str(place), session_write_delay=60.0) as first:
        first.new_session(id="my-repo", gate="fixed", chunk_size=64, budget=3.5)
        first.adapt("my-repo", TEXT[:1500])
        before = first.session("my-repo")
    # Drained: saved long before the delay was over.
    with live_server(tiny_llama_dir, sessions=str(place)) as second:
        listed = second.http.get("/v1/sessions").json()["data"]
        assert [each["id"] for each in listed] == ["my-repo"]
        after = second.session("my-repo")
        ignored = ("last_used", "kept_versions")
        assert {k: v for k, v in after.items() if k not in ignored} == {
            k: v for k, v in before.items() if k not in ignored
        }
        assert after["kept_versions"][-1] == after["version"] > 0
        again = second.adapt("my-repo", TEXT[:1500])
        assert {chunk["reason"] for chunk in again["chunks"]} <= {"seen", "short"}


def test_rollback_and_snapshot(durable: Live) -> None:
    name = durable.new_session(gate="fixed", chunk_size=64)
    durable.adapt(name, TEXT[:600])
    before = saved(durable, name)
    marked = durable.http.post(f"/v1/sessions/{name}/snapshot").json()
    assert marked["snapshots"] == [before["version"]]
    for part in range(1, 5):
        durable.adapt(name, TEXT[600 * part : 600 * (part + 1)])
        later = saved(durable, name)
    assert before["version"] in later["kept_versions"]
    assert len(later["kept_versions"]) == 4
    answer = durable.http.post(f"/v1/sessions/{name}/rollback", json={"version": before["version"]})
    assert answer.status_code == 200, answer.text
    back = answer.json()
    assert (back["digest"], back["norm"]) == (before["digest"], before["norm"])
    assert back["version"] == later["version"] + 1
    assert back["learned_tokens"] == before["learned_tokens"]
    assert back["cost"] == later["cost"]
    assert saved(durable, name)["digest"] == before["digest"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"version": 99}, 404, "version"),
        ({"version": -1}, 400, "version"),
        ({"version": "1"}, 400, "version"),
        ({"version": 1.5}, 400, "version"),
        ({}, 400, "version"),
        ({"version": 0, "extra": 1}, 400, "extra"),
        ({"version": 2**70}, 400, "version"),
    ],
)
def test_bad_rollback_is_refused_by_field(
    durable: Live, body: dict[str, object], status: int, param: str
) -> None:
    name = durable.new_session()
    answer = durable.http.post(f"/v1/sessions/{name}/rollback", json=body)
    assert (answer.status_code, error(answer)["param"]) == (status, param), answer.text


def test_unknown_session_is_404_everywhere(durable: Live) -> None:
    calls = [
        ("GET", "", None), ("DELETE", "", None), ("POST", "/fork", {}), ("POST", "/snapshot", None),
        ("POST", "/rollback", {"version": 0}), ("GET", "/adapter", None),
        ("POST", "/adapt", {"documents": [{"text": "x"}]}),
    ]  # fmt: skip
    for method, path, body in calls:
        answer = durable.http.request(method, f"/v1/sessions/nobody{path}", json=body)
        assert answer.status_code == 404, answer.text
    for name in ("..", "%2e%2e", "..%2f..%2fetc", "a%2fb", "~locks", "%00"):
        assert durable.http.get(f"/v1/sessions/{name}").status_code in (307, 404)
    for name in ("..", "../sessions", "a/b", "\0", "~locks"):
        asked = {"prompt": PROMPT, "max_tokens": 1, "ttt": {"session": name}}
        assert durable.http.post("/v1/completions", json=asked).status_code == 404
    assert not (Path(durable.core.sessions.store_url or "") / "~locks" / "nobody").exists()


def test_deleted_session_is_gone_from_disk_when_the_answer_comes(
    durable: Live, place: Path
) -> None:
    name = durable.new_session(gate="fixed", chunk_size=64)
    durable.adapt(name, TEXT[:600])
    saved(durable, name)
    assert (place / name).is_dir()
    assert durable.http.delete(f"/v1/sessions/{name}").status_code == 200
    assert not (place / name).exists()
    assert durable.http.get(f"/v1/sessions/{name}").status_code == 404


def test_version_directories_are_private(durable: Live, place: Path) -> None:
    name = durable.new_session()
    saved(durable, name)
    for path in [place, *place.rglob("*")]:
        if path.parent.name != "~locks":
            assert path.stat().st_mode & 0o077 == 0, path


def test_two_servers_of_one_store_never_share_a_session(
    durable: Live, tiny_llama_dir: Path, place: Path
) -> None:
    name = durable.new_session(gate="fixed", chunk_size=64)
    durable.adapt(name, TEXT[:600])
    saved(durable, name)
    with live_server(tiny_llama_dir, sessions=str(place)) as other:
        answers = [
            other.http.get(f"/v1/sessions/{name}"),
            other.http.delete(f"/v1/sessions/{name}"),
            other.http.post("/v1/completions", json={"prompt": PROMPT, "ttt": {"session": name}}),
            other.http.post(f"/v1/sessions/{name}/adapt", json={"documents": [{"text": "x = 1"}]}),
            other.http.post("/v1/sessions", json={"id": name}),
        ]
        assert [answer.status_code for answer in answers] == [409] * 5
        assert "another server" in error(answers[0])["message"]
        # Made there after this server had looked: found nevertheless.
        mine = other.new_session(gate="fixed", chunk_size=64)
        other.adapt(mine, TEXT[:600])
        version = saved(other, mine)["version"]
        assert durable.http.get(f"/v1/sessions/{mine}").status_code == 409
    assert durable.session(mine)["version"] == version


@pytest.mark.parametrize("kind", ["file", "lease"])
def test_two_servers_of_one_store_never_write_versions_in_turns(
    tiny_llama_dir: Path, place: Path, kind: str
) -> None:
    url = str(place) if kind == "file" else f"memory://{place.parent.name}-{os.getpid()}"
    options = {"sessions": url, "session_write_delay": 0.0, "session_idle_seconds": 0.5}
    with (
        live_server(tiny_llama_dir, **options) as one,
        live_server(tiny_llama_dir, **options) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        name = one.new_session(gate="fixed", chunk_size=64)

        def teach(live: Live, part: int) -> httpx.Response:
            text = TEXT[500 * part : 500 * (part + 1)]
            return live.http.post(
                f"/v1/sessions/{name}/adapt", json={"documents": [{"text": text}]}
            )

        versions = []
        for part in range(8):
            mine = pool.submit(teach, one, part)
            theirs = pool.submit(teach, other, part)
            assert error(theirs.result())["code"] == "session_elsewhere"
            assert theirs.result().status_code == 409
            versions.append(mine.result().raise_for_status().json()["version_after"])
        until = time.monotonic() + 20
        while (answer := teach(other, 8)).status_code == 409:  # until it has been idle for long
            assert time.monotonic() < until
            time.sleep(0.1)
        versions.append(answer.json()["version_after"])
        assert teach(one, 9).status_code == 409
        versions.append(teach(other, 9).raise_for_status().json()["version_after"])
    assert versions == sorted(set(versions))


def test_store_that_can_not_be_written_is_reported_and_requests_go_on(
    tiny_llama_dir: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = LocalFiles._write
    full = False

    def maybe_full(self: LocalFiles, path: str, data: bytes) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, path, data)

    monkeypatch.setattr(LocalFiles, "_write", maybe_full)
    with live_server(tiny_llama_dir, sessions=str(place), session_write_delay=0.0) as live:
        name = live.new_session(gate="fixed", chunk_size=64)
        saved(live, name)
        full = True
        report = live.adapt(name, TEXT[:600])
        assert report["version_after"] > 0
        until = time.monotonic() + 20
        while live.value("session_store_failures_total") < 1:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert live.value("session_store_unsaved") == 1
        assert live.value("session_store_unsaved_seconds") > 0
        plain = live.http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 4})
        assert plain.status_code == 200
        assert live.adapt(name, TEXT[600:1200])["version_after"] > report["version_after"]
        assert live.session(name)["kept_versions"] == [0]
        answer = live.http.delete(f"/v1/sessions/{name}")
        assert answer.status_code == 503
        assert error(answer)["code"] == "session_store_unavailable"
        assert "No space left" in error(answer)["message"]
        full = False


def test_damaged_session_is_reported_and_the_others_go_on(
    tiny_llama_dir: Path, place: Path
) -> None:
    with live_server(tiny_llama_dir, sessions=str(place), session_write_delay=0.0) as live:
        for name in ("bad", "torn", "good"):
            live.new_session(id=name, gate="fixed", chunk_size=64)
            saved(live, name)
            live.adapt(name, TEXT[:600])
            newest = saved(live, name)
    for path in (place / "bad").rglob("session.json"):
        path.write_bytes(path.read_bytes()[:-40])
    torn = place / "torn" / f"v{newest['version']:08d}" / "adapter_model.safetensors"
    torn.write_bytes(b"\0" * torn.stat().st_size)
    with live_server(tiny_llama_dir, sessions=str(place)) as live:
        listed = [each["id"] for each in live.http.get("/v1/sessions").json()["data"]]
        assert sorted(listed) == ["good", "torn"]
        assert live.value("session_store_unreadable") == 1
        for answer in (
            live.http.get("/v1/sessions/bad"),
            live.http.post("/v1/completions", json={"prompt": PROMPT, "ttt": {"session": "bad"}}),
        ):
            assert answer.status_code == 409
            assert error(answer)["code"] == "session_damaged"
            assert "delete it" in error(answer)["message"]
        back = live.session("torn")
        assert back["version"] == newest["version"] + 1
        assert live.value("session_store_recoveries_total") == 1
        assert live.session("good")["digest"] == newest["digest"]
        assert live.http.delete("/v1/sessions/bad").status_code == 200
        assert live.http.get("/v1/sessions/bad").status_code == 404


def test_more_sessions_than_fit_are_read_from_the_store(tiny_llama_dir: Path, place: Path) -> None:
    options = {"adapter_slots": 2, "ram_sessions": 1, "session_write_delay": 0.0}
    with live_server(tiny_llama_dir, sessions=str(place), **options) as live:
        names = [live.new_session(gate="fixed", chunk_size=64) for _ in range(6)]
        digests = {}
        for number, name in enumerate(names):
            live.adapt(name, TEXT[500 * number : 500 * (number + 1)])
            digests[name] = saved(live, name)["digest"]
        until = time.monotonic() + 20
        while live.value("session_store_evictions_total") < 3:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert {name: live.session(name)["digest"] for name in names} == digests
        assert live.value("session_store_load_seconds_count") >= 3
        assert live.value("session_store_commit_seconds_count") >= 6
        assert live.value("session_store_bytes_total") > 0


@pytest.fixture
def serve(tiny_llama_dir: Path, tmp_path: Path) -> Iterator[Any]:
    """Starts `ponderttt serve` with its data in a directory of the test; gives its URL."""
    running: list[subprocess.Popen[str]] = []

    def start(*options: str) -> tuple[subprocess.Popen[str], str, str]:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "--model", str(tiny_llama_dir), "--port", "0",
             "--no-measure-costs", "--log-level", "warning", "--threads", "1", *options],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT),
                                        "PONDERTTT_DATA": str(tmp_path / "data")},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        running.append(process)
        assert process.stdout is not None
        banner = ""
        for line in process.stdout:
            banner += line
            if line.startswith("    -d"):
                break
        found = re.search(r"http://[\d.:]+", banner)
        assert found is not None, banner
        return process, found[0], banner

    yield start
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_server_that_is_killed_loses_no_more_than_the_delay(
    serve: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    process, url, banner = serve("--session-write-delay", "0.2")
    place = tmp_path / "data" / "sessions" / tiny_llama_dir.name
    assert f"sessions in {place} (0 there)" in banner
    body = {"id": "my-repo", "gate": "fixed", "chunk_size": 64}
    assert httpx.post(f"{url}/v1/sessions", json=body).status_code == 201
    lesson = {"documents": [{"text": TEXT[:600]}]}
    httpx.post(f"{url}/v1/sessions/my-repo/adapt", json=lesson, timeout=60).raise_for_status()
    before = httpx.get(f"{url}/v1/sessions/my-repo").json()
    time.sleep(1.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, url, banner = serve()
    assert f"sessions in {place} (1 there)" in banner
    after = httpx.get(f"{url}/v1/sessions/my-repo").json()
    assert (after["version"], after["digest"]) == (before["version"], before["digest"])
    assert after["version"] > 0
