"""Many at once, and what an interruption leaves."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import clients.bench.functional.forgetting
import clients.bench.functional.run
from clients.api import Client
from clients.async_api import AsyncClient
from clients.bench.functional.ask import Asking, draw_seed, learning
from clients.bench.functional.drive import Drive, units
from clients.bench.functional.forgetting import humaneval_in_session
from clients.bench.functional.humaneval import load_humaneval
from clients.bench.functional.run import KEY_FIELDS, METRICS
from clients.results import Header, ResultFile, read_results
from clients.sandbox import Limits, Outcome, SandboxError
from ponderttt.errors import InvalidRequestError, PonderError
from tests.clients.bench.functional.fake_coder import FakeCoder, FakeSandbox

ASKING = Asking(
    model="coder", prompting="chat", max_tokens=9, temperature=0.0, top_p=1.0, ttt=None,
    session=None, fork=False, seed=0, timeout=5.0,
)  # fmt: skip
HEADER = Header("humaneval", 0, "coder", "http://here", None, {}, KEY_FIELDS, METRICS)


class SlowSandbox(FakeSandbox):
    """Holds every program until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Semaphore(0), threading.Event()

    def run(self, program: str, *rest: Any, **more: Any) -> Outcome:
        self.begun.release()
        assert self.go.wait(10)
        return super().run(program, *rest, **more)


def test_answers_that_came_before_an_interruption_are_judged_and_kept(tmp_path: Path) -> None:
    suite, sandbox = load_humaneval(None).only(None, 6), SlowSandbox()
    server = FakeCoder(suite)

    async def interrupted(results: ResultFile) -> None:
        with ThreadPoolExecutor(4) as pool:
            async with AsyncClient("http://here", transport=server.transport) as client:
                drive = Drive(
                    client, suite, ASKING, sandbox, Limits(), pool, results, lambda record: None
                )
                run = asyncio.create_task(drive.run(units(suite, 1), 2))
                for _ in range(2):
                    assert await asyncio.to_thread(sandbox.begun.acquire, timeout=10)
                run.cancel()
                # It waits for the programs that are running.
                await asyncio.sleep(0.02)
                assert not run.done()
                sandbox.go.set()
                with pytest.raises(asyncio.CancelledError):
                    await run

    with ResultFile.open(tmp_path / "r.jsonl", HEADER) as results:
        asyncio.run(interrupted(results))
    _, records = read_results(tmp_path / "r.jsonl")
    assert sorted(record["task_id"] for record in records) == ["HumanEval/0", "HumanEval/1"]
    assert len(server.asked) == 2


def test_sandbox_that_breaks_ends_the_run_and_judges_nothing(tmp_path: Path) -> None:
    suite = load_humaneval(None).only(None, 3)
    server = FakeCoder(suite)

    class Broken(FakeSandbox):
        def run(self, *_: Any, **__: Any) -> Outcome:
            raise SandboxError("the sandbox ended before the program began")

    async def run(results: ResultFile) -> None:
        with ThreadPoolExecutor(1) as pool:
            async with AsyncClient("http://here", transport=server.transport) as client:
                drive = Drive(
                    client, suite, ASKING, Broken(), Limits(), pool, results, lambda r: None
                )
                await drive.run(units(suite, 1), 1)

    with ResultFile.open(tmp_path / "r.jsonl", HEADER) as results:
        with pytest.raises(SandboxError, match="before the program began"):
            asyncio.run(run(results))
        assert results.records == []


def test_full_disk_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = load_humaneval(None).only(None, 6)
    server = FakeCoder(suite)

    def full(self: ResultFile, record: Any) -> None:
        raise PonderError("r.jsonl can't be written: No space left on device")

    monkeypatch.setattr(ResultFile, "append", full)

    async def run(results: ResultFile) -> None:
        with ThreadPoolExecutor(1) as pool:
            async with AsyncClient("http://here", transport=server.transport) as client:
                drive = Drive(
                    client, suite, ASKING, FakeSandbox(), Limits(), pool, results, lambda r: None
                )
                await drive.run(units(suite, 1), 2)

    with (
        ResultFile.open(tmp_path / "r.jsonl", HEADER) as results,
        pytest.raises(PonderError, match="No space left"),
    ):
        asyncio.run(run(results))
    assert len(server.asked) <= 3


def test_first_samples_of_all_problems_come_first() -> None:
    suite = load_humaneval(None).only(None, 2)
    keys = [unit.key for unit in units(suite, 2)]
    assert keys == [
        ("HumanEval/0", 0), ("HumanEval/1", 0), ("HumanEval/0", 1), ("HumanEval/1", 1),
    ]  # fmt: skip


def test_seeds_differ_by_task_sample_and_seed() -> None:
    seeds = [draw_seed(s, t, n) for s in (0, 1) for t in ("a", "b") for n in range(3)]
    assert len(set(seeds)) == 12
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_learning_says_only_what_was_given() -> None:
    assert learning() is None
    assert learning(session="mine") == {"gate": "off"}
    assert learning(gate="policy", chunk_size=32) == {"gate": "policy", "chunk_size": 32}
    assert learning(gate="off") == {"gate": "off"}
    with pytest.raises(InvalidRequestError, match="--adapt-on: 'both' is for learning"):
        learning(adapt_on="both")


def test_humaneval_in_a_session_reads_it_and_can_be_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    suite = load_humaneval(None).only(None, 3)
    server = FakeCoder(suite, ["HumanEval/1"], sessions={"mine": "abc"})
    module = clients.bench.functional.run
    monkeypatch.setattr(
        module, "Client", lambda *a, **k: Client(*a, transport=server.transport, **k)
    )
    monkeypatch.setattr(
        module, "AsyncClient", lambda *a, **k: AsyncClient(*a, transport=server.transport, **k)
    )
    found = []
    for session, name in ((None, "off"), ("mine", "in")):
        header, records = humaneval_in_session(
            "http://here", session, tmp_path / f"{name}.jsonl", FakeSandbox(), limit=3, quiet=True
        )
        assert [record["passed"] for record in records] == [True, False, True]
        found.append(header)
    assert {json_of["ttt"].get("session") for _, json_of in server.asked} == {None, "mine"}
    assert {json_of["ttt"]["gate"] for _, json_of in server.asked} == {"off"}
    assert found[1].settings["session_digest"] == "abc"
    assert server.sessions == {"mine": "abc"}
