"""Sessions of an engine with a store: a restart changes nothing of what they learn next."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.config import EngineConfig
from ponderttt.engine.core import EngineCore
from ponderttt.engine.engine import Engine
from ponderttt.engine.outputs import DoneEvent
from ponderttt.engine.request import AdaptRequest, GenerateRequest
from ponderttt.errors import ConflictError, NotFoundError, StoreError
from ponderttt.fast_weights.layout import LoRAConfig
from ponderttt.sessions.config import StoreConfig
from tests.ponderttt.engine import harness
from tests.ponderttt.sessions.stores import attached, memory_url, same

#: Every gate that keeps state of its own between chunks.
TTT = TTTParams(session="s", gate="threshold", chunk_size=32, budget=2.5)


def make_core(directory: Path, url: str | None) -> EngineCore:
    store = None if url is None else StoreConfig(url)
    core = harness.make_core(directory, store=store, adapter_slots=2)
    if "s" not in core.sessions.names():
        core.sessions.create("s", TTTParams())
    return core


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_session_resumed_after_a_restart_learns_bit_by_bit_as_one_that_never_stopped(
    kind: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    url = str(tmp_path) if kind == "local" else memory_url()
    lessons = [harness.text(tiny_llama_dir, number, 200) for number in range(3)]
    steady = make_core(tiny_llama_dir, None)
    for lesson in lessons:
        stopping = make_core(tiny_llama_dir, url)
        reports = [
            harness.adapt(core, lesson, ttt=TTT).report.chunks for core in (steady, stopping)
        ]
        fields = [
            [(r.action, r.reason, r.loss_before, r.loss_after, r.cost) for r in report]
            for report in reports
        ]
        assert fields[0] == fields[1]
        one, other = steady.sessions.get("s"), stopping.sessions.get("s")
        assert same(steady.sessions.state(one), stopping.sessions.state(other))
        assert (one.version, one.threshold, one.loss_ema, one.learned) == (
            other.version, other.threshold, other.loss_ema, other.learned,
        )  # fmt: skip
        assert one.ledger.accounts == other.ledger.accounts
        stopping.close()
    assert steady.sessions.get("s").version > 3


def test_session_put_away_between_requests_answers_and_learns_the_same(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    steady, moving = make_core(tiny_llama_dir, None), make_core(tiny_llama_dir, str(tmp_path))
    for number in range(3):
        prompt = harness.text(tiny_llama_dir, number, 120)
        moving.sessions.flush()
        if not moving.sessions.get("s").cold:
            attached(moving.sessions).upkeep.put_away(moving.sessions.get("s"))
        outcomes = [harness.generate(core, prompt, ttt=TTT) for core in (steady, moving)]
        assert outcomes[0].tokens == outcomes[1].tokens
        assert outcomes[0].report.digest == outcomes[1].report.digest
        assert outcomes[0].report.version_after == outcomes[1].report.version_after
    assert moving.stats().store is not None
    assert moving.stats().store.loads >= 2  # type: ignore[union-attr]


def test_rollback_is_seen_by_the_next_request_in_spite_of_the_prefix_cache(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    core = make_core(tiny_llama_dir, str(tmp_path))
    off = TTTParams(session="s", gate="off")
    prompt = harness.text(tiny_llama_dir, 5, 130)
    harness.adapt(core, harness.text(tiny_llama_dir, 0, 160), ttt=TTT)
    core.sessions.flush()
    version = core.sessions.get("s").version
    before = harness.generate(core, prompt, ttt=off)
    harness.adapt(core, harness.text(tiny_llama_dir, 1, 320), ttt=TTT)
    core.sessions.flush()
    between = harness.generate(core, prompt, ttt=off)
    assert between.report.digest != before.report.digest
    core.sessions.rollback("s", version)
    after = harness.generate(core, prompt, ttt=off)
    assert after.report.digest == before.report.digest
    assert after.tokens == before.tokens


def test_engine_of_a_program_keeps_sessions_in_a_directory(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    config = EngineConfig(measure_costs=False, lora=LoRAConfig(layers=2), rule=harness.RULE)
    text = "def area(radius):\n    return 3.14 * radius * radius\n" * 20

    def start() -> Engine:
        return Engine.from_pretrained(str(tiny_llama_dir), sessions=tmp_path / "s", config=config)

    with start() as engine:
        session = engine.session("repo")
        session.adapt(text, ttt=TTTParams(gate="fixed", chunk_size=32))
        version = session.snapshot()
        weights = harness.weights(engine.core, "repo")
        # Saved when the call has returned, but nobody else's yet.
        other = start()
        with pytest.raises(ConflictError):
            other.session("repo").adapt(text)
        other.close()
    with start() as engine:
        session = engine.session("repo")
        assert session.info.version == version
        assert torch.equal(harness.weights(engine.core, "repo"), weights)
        session.adapt("x = 1\n" * 40, ttt=TTTParams(gate="fixed", chunk_size=32))
        assert session.rollback(version) == session.info.version > version
        assert torch.equal(harness.weights(engine.core, "repo"), weights)


def test_request_of_a_session_whose_store_fails_ends_with_the_error_and_others_go_on(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(tiny_llama_dir, str(tmp_path))
    core.sessions.flush()
    attached(core.sessions).upkeep.put_away(core.sessions.get("s"))
    store = attached(core.sessions).vault._store

    def fail(path: str) -> bytes:
        raise StoreError("the disk is gone")

    monkeypatch.setattr(store.files, "read", fail)
    prompt = harness.text(tiny_llama_dir, 0, 64)
    bad = harness.submit(core, AdaptRequest((prompt,), TTT))
    good = harness.submit(core, GenerateRequest(prompt, harness.GREEDY))
    harness.drain(core)
    assert isinstance(bad.error, StoreError)
    assert good.tokens
    monkeypatch.undo()
    assert harness.adapt(core, prompt, ttt=TTT).report.version_after >= 0


@pytest.fixture
def slow(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[EngineCore, threading.Event]:
    """An engine whose session is in the store alone, which waits for an event to give it."""
    core = make_core(tiny_llama_dir, str(tmp_path))
    core.sessions.flush()
    attached(core.sessions).upkeep.put_away(core.sessions.get("s"))
    files, come = attached(core.sessions).vault._store.files, threading.Event()
    read = files.read

    def wait(path: str) -> bytes | None:
        come.wait(10)
        return read(path)

    monkeypatch.setattr(files, "read", wait)
    return core, come


def test_slow_store_holds_up_those_who_need_it_and_nobody_else(
    tiny_llama_dir: Path, slow: tuple[EngineCore, threading.Event]
) -> None:
    core, come = slow
    prompt = harness.text(tiny_llama_dir, 0, 64)
    off = TTTParams(session="s", gate="off")
    waiting = [
        harness.submit(core, request)
        for request in (
            GenerateRequest(prompt, harness.GREEDY, off),
            AdaptRequest((prompt,), TTT),
            GenerateRequest(prompt, harness.GREEDY, off),
        )
    ]
    other = harness.submit(core, GenerateRequest(prompt, harness.GREEDY))
    harness.step_until(core, lambda: other.reasons)
    harness.step_until(core, lambda: isinstance(other.events[-1], DoneEvent))
    assert [each.events for each in waiting] == [[], [], []]
    assert core.next_due() is not None
    come.set()
    harness.drain(core)
    assert [each.done.prompt_tokens for each in waiting] == [64] * 3
    assert core.stats().store.loads == 1  # type: ignore[union-attr]
    assert not core._admission.awaits_sessions


def test_session_that_nobody_waits_for_any_more_is_let_go(
    tiny_llama_dir: Path, slow: tuple[EngineCore, threading.Event]
) -> None:
    core, come = slow
    prompt = harness.text(tiny_llama_dir, 0, 64)
    request = GenerateRequest(prompt, harness.GREEDY, TTT)
    harness.submit(core, request)
    core.step()
    assert core._admission.awaits_sessions
    core.abort(request.request_id)
    assert not core._admission.awaits_sessions
    deleted = harness.submit(core, GenerateRequest(prompt, harness.GREEDY, TTT))
    core.step()
    core.delete_session("s")
    core.step()
    assert isinstance(deleted.error, NotFoundError)
    assert not core._admission.awaits_sessions
    come.set()
