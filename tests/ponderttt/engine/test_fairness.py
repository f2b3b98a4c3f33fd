"""Sharing the engine: turns between tenants, deadlines, and documents that give way."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.core import EngineCore
from ponderttt.engine.outputs import TokenEvent
from ponderttt.engine.request import AdaptRequest, GenerateRequest, Tenant
from ponderttt.errors import OverloadedError
from tests.ponderttt.engine import harness
from tests.ponderttt.engine.harness import Outcome

OFF = TTTParams(gate="off")


def make_core(directory: Path, *sessions: str, **settings: Any) -> EngineCore:
    core = harness.make_core(directory, **settings)
    for name in sessions:
        core.sessions.create(name, TTTParams())
    return core


def ask(directory: Path, number: int, length: int = 20, **changes: Any) -> GenerateRequest:
    """A completion of 6 tokens."""
    sampling = replace(harness.GREEDY, max_tokens=6)
    return GenerateRequest(harness.text(directory, number, length), sampling, OFF, **changes)


def teach(directory: Path, session: str, length: int, **changes: Any) -> AdaptRequest:
    """A document that takes four steps on each of its chunks of 32 tokens."""
    ttt = TTTParams(session=session, action=Action.UPDATE_4, chunk_size=32)
    return AdaptRequest((harness.corpus(directory)[:length],), ttt, **changes)


def begun(outcome: Outcome) -> bool:
    return any(isinstance(event, TokenEvent) for event in outcome.events)


def phases_until_first_token(core: EngineCore, request: GenerateRequest) -> int:
    """Prefills and writes from a request's arrival to its first token, its own one included.

    Decode phases of others come on top, for as long as the phase before them has taken.
    """
    recorder = core.observer = harness.Recorder()
    outcome = harness.submit(core, request)
    harness.step_until(core, lambda: begun(outcome))
    return sum(record.kind != "decode" for record in recorder.steps)


# --- tenants --------------------------------------------------------------------------------------


def test_tenant_with_one_request_waits_for_one_of_a_tenant_with_many(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, max_num_seqs=1)
    many = [harness.submit(core, ask(tiny_llama_dir, n, tenant=Tenant("many"))) for n in range(8)]
    one = harness.submit(core, ask(tiny_llama_dir, 9, tenant=Tenant("one")))
    harness.step_until(core, lambda: one.ended)
    assert sum(outcome.ended for outcome in many) == 1
    harness.drain(core)
    assert all(outcome.done.generated_tokens == 6 for outcome in (*many, one))


def test_tenant_beyond_its_line_is_refused_while_others_may_still_wait(
    tiny_llama_dir: Path,
) -> None:
    core = make_core(tiny_llama_dir, "s", max_waiting=4)
    mine, other = Tenant("mine", max_waiting=2), Tenant("other", max_waiting=2)
    harness.submit(core, ask(tiny_llama_dir, 0, tenant=mine))
    harness.submit(core, teach(tiny_llama_dir, "s", 64, tenant=mine))
    with pytest.raises(OverloadedError, match="2 requests of yours"):
        harness.submit(core, ask(tiny_llama_dir, 1, tenant=mine))
    harness.submit(core, ask(tiny_llama_dir, 2, tenant=other))
    harness.submit(core, ask(tiny_llama_dir, 3))
    with pytest.raises(OverloadedError, match="4 requests are waiting"):
        harness.submit(core, ask(tiny_llama_dir, 4))
    harness.drain(core)


def test_request_that_waits_too_long_is_refused_and_the_others_go_on(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s", max_num_seqs=1, max_wait_seconds=60.0)
    recorder = core.observer = harness.Recorder()
    running = harness.submit(core, ask(tiny_llama_dir, 0))
    core.step()
    long_ago = time.monotonic() - 61.0
    late = [
        harness.submit(core, ask(tiny_llama_dir, 1, arrival=long_ago)),
        harness.submit(core, teach(tiny_llama_dir, "s", 64, arrival=long_ago)),
    ]
    in_time = harness.submit(core, ask(tiny_llama_dir, 2))
    core.step()
    for outcome in late:
        assert isinstance(outcome.error, OverloadedError)
        assert "60 s" in str(outcome.error)
    harness.drain(core)
    assert running.done.generated_tokens == in_time.done.generated_tokens == 6
    assert sorted(outcome for outcome, *_ in recorder.outcomes) == [
        "error", "error", "length", "length",
    ]  # fmt: skip
    assert harness.holdings(core) == (0, 0, {"s": 0})


# --- documents ------------------------------------------------------------------------------------


def test_completion_gets_its_first_token_within_two_phases_at_any_moment_of_a_long_document(
    tiny_llama_dir: Path,
) -> None:
    core = make_core(tiny_llama_dir, "s")
    document = harness.submit(core, teach(tiny_llama_dir, "s", 1200))
    waited = []
    for number in range(20):
        for _ in range(number % 7 + 1):
            assert core.step()
        assert not document.ended
        waited.append(phases_until_first_token(core, ask(tiny_llama_dir, number)))
    assert max(waited) <= 2
    harness.drain(core)
    assert document.report.version_after > 0


def test_completion_gets_its_first_token_within_two_phases_beside_many_documents(
    tiny_llama_dir: Path,
) -> None:
    names = [f"s{n}" for n in range(12)]
    core = make_core(tiny_llama_dir, *names, max_num_seqs=8, max_kv_tokens=4096)
    documents = [harness.submit(core, teach(tiny_llama_dir, name, 400)) for name in names]
    for _ in range(5):
        core.step()
    running = core.stats().running
    assert running == core.config.max_adapting == 4
    waited: list[int] = []
    for number in range(12):
        for _ in range(number % 5 + 1):
            assert core.step()
        waited.append(phases_until_first_token(core, ask(tiny_llama_dir, number)))
    assert max(waited) <= 2
    harness.drain(core)
    assert all(document.report.version_after > 0 for document in documents)


def test_documents_of_one_tenant_do_not_hold_every_place_until_their_end(
    tiny_llama_dir: Path,
) -> None:
    core = make_core(
        tiny_llama_dir,
        "a0",
        "a1",
        "a2",
        "b0",
        max_num_seqs=4,
        max_model_len=64,
        max_wait_seconds=60,
    )
    many, one = Tenant("many"), Tenant("one")
    long_ago = time.monotonic() - 59.0
    first = [
        harness.submit(core, teach(tiny_llama_dir, name, 400, tenant=many, arrival=long_ago))
        for name in ("a0", "a1", "a2")
    ]
    harness.step_until(core, lambda: all(outcome.chunks for outcome in first[:2]))
    assert (core.stats().running, core.stats().waiting) == (2, 1)
    late = harness.submit(core, teach(tiny_llama_dir, "b0", 100, tenant=one))
    harness.step_until(core, lambda: late.chunks)
    assert (core.stats().running, core.stats().waiting) == (2, 2)
    time.sleep(1.1)
    harness.step_until(core, lambda: late.ended)
    # What has begun does not expire while it waits again.
    assert isinstance(first[2].error, OverloadedError)
    assert not any(outcome.ended for outcome in first[:2])
    harness.drain(core)
    assert [len(outcome.chunks) for outcome in (*first[:2], late)] == [13, 13, 4]
    assert all(outcome.report.version_after > 0 for outcome in (*first[:2], late))
    assert core.stats().kv_tokens == 0
    assert all(core.sessions.get(name).pins == 0 for name in core.sessions.names())


def test_long_prompt_is_read_before_documents_go_on(tiny_llama_dir: Path) -> None:
    names = [f"s{n}" for n in range(4)]
    core = make_core(tiny_llama_dir, *names, max_batch_tokens=64, busy_batch_tokens=64)
    documents = [harness.submit(core, teach(tiny_llama_dir, name, 1000)) for name in names]
    for number in range(6):
        for _ in range(number + 5):
            core.step()
        # Seven phases of its own, and every fourth one is the documents'.
        asked = ask(tiny_llama_dir, number, length=448)
        assert phases_until_first_token(core, asked) <= 10
        harness.step_until(core, lambda: core.stats().running == len(names))
    assert not any(document.ended for document in documents)
    harness.drain(core)


def test_documents_go_on_under_a_steady_load_of_completions(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s", max_num_seqs=2)
    document = harness.submit(core, teach(tiny_llama_dir, "s", 256))
    completions: list[Outcome] = []
    for number in range(600):
        if core.waiting < 4:
            completions.append(harness.submit(core, ask(tiny_llama_dir, number % 12, length=200)))
        core.step()
        if document.ended:
            break
    assert document.report.version_after > 0
    assert len(document.chunks) == 8
    assert sum(outcome.ended for outcome in completions) > 8
    harness.drain(core)


def test_long_documents_leave_half_of_the_memory_to_completions(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s", "t", max_kv_tokens=200)
    documents = [harness.submit(core, teach(tiny_llama_dir, name, 400)) for name in "st"]
    core.step()
    assert (core.stats().kv_tokens, core.stats().waiting) == (100, 1)
    completion = harness.submit(core, ask(tiny_llama_dir, 3, length=90))
    harness.step_until(core, lambda: completion.ended, limit=40)
    assert not documents[0].ended
    harness.drain(core)
    assert [len(document.chunks) for document in documents] == [16, 16]
    assert core.stats().kv_tokens == 0


def test_completion_that_waits_for_memory_is_not_passed_by_documents(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s", max_kv_tokens=120)
    running = harness.submit(core, ask(tiny_llama_dir, 0, length=60))
    core.step()
    waiting = harness.submit(core, ask(tiny_llama_dir, 1, length=100))
    document = harness.submit(core, teach(tiny_llama_dir, "s", 40))
    harness.step_until(core, lambda: running.ended)
    assert document.events == []
    harness.step_until(core, lambda: waiting.ended)
    harness.drain(core)
    assert document.ended
