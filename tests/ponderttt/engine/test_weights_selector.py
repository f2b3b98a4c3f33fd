"""Which weights a request reads, and when its prompt is to tell."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import TTTParams
from tests.ponderttt.engine import harness
from tests.ponderttt.engine.taught import LEARNED, OTHER, READ, ask, taught


@pytest.mark.parametrize(
    ("ttt", "changes"),
    [
        (replace(READ, read="session"), {}),
        (TTTParams(session="s", gate="fixed", chunk_size=32, adapt_on="both"), {}),
        (READ, {"length": 16}),
        (READ, {"max_tokens": 0}),
        (TTTParams(gate="fixed", chunk_size=32), {}),
    ],
    ids=["asked for", "learns its answer", "too short", "generates nothing", "no session"],
)
def test_nothing_is_compared(tiny_llama_dir: Path, ttt: TTTParams, changes: Any) -> None:
    (got,) = harness.run(taught(tiny_llama_dir), ask(tiny_llama_dir, OTHER, ttt, **changes))
    assert got.report.choice is None


def test_fresh_session_is_the_base_model(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir)
    core.sessions.create("s", TTTParams())
    (got,) = harness.run(core, ask(tiny_llama_dir, OTHER))
    assert got.report.choice is None


def test_session_says_itself_how_it_is_read(tiny_llama_dir: Path) -> None:
    core = taught(tiny_llama_dir)
    core.sessions.get("s").defaults = TTTParams(read="session")
    (got,) = harness.run(core, ask(tiny_llama_dir, OTHER))
    assert got.report.choice is None
    (got,) = harness.run(core, ask(tiny_llama_dir, OTHER, replace(READ, read="auto")))
    assert got.report.choice is not None


def test_prompt_without_room_for_two_readings_is_answered_by_the_session(
    tiny_llama_dir: Path,
) -> None:
    # 90 of the prompt and 12 of the answer.
    for room, compared in ((203, False), (204, True)):
        core = taught(tiny_llama_dir, max_kv_tokens=room)
        (got,) = harness.run(core, ask(tiny_llama_dir, OTHER))
        assert (got.report.choice is not None) == compared


@pytest.mark.parametrize(
    ("ttt", "n", "rooms"),
    [
        (READ, 3, {306: True}),
        # The siblings come while a chunk may still be learned from what the session has read.
        (replace(harness.FIXED, session="s"), 1, {203: False, 204: True}),
        (replace(harness.FIXED, session="s"), 3, {306: False, 407: False, 408: True}),
    ],
)
def test_prompt_with_siblings_is_compared_where_all_that_read_have_room(
    tiny_llama_dir: Path, ttt: TTTParams, n: int, rooms: dict[int, bool]
) -> None:
    for room, compared in rooms.items():
        core = taught(tiny_llama_dir, max_kv_tokens=room)
        got = harness.submit(core, ask(tiny_llama_dir, OTHER, ttt, n=n, temperature=1.0, seed=1))
        most = 0
        while core.has_work:
            core.step()
            most = max(most, core.stats().kv_tokens)
        assert (got.report.choice is not None) == compared
        assert most <= room


def test_session_that_learns_while_the_request_waits_is_judged_as_it_is_then(
    tiny_llama_dir: Path,
) -> None:
    core = harness.make_core(tiny_llama_dir, max_batch_tokens=32, busy_batch_tokens=32)
    core.sessions.create("s", TTTParams())
    strangers = [ask(tiny_llama_dir, number, None, length=200) for number in range(3)]
    learner = ask(
        tiny_llama_dir, LEARNED, TTTParams(session="s", action=Action.UPDATE_4, chunk_size=16),
        length=64, max_tokens=1,
    )  # fmt: skip
    *_, got = harness.run(core, *strangers, learner, ask(tiny_llama_dir, OTHER))
    assert (got.report.version_before > 0) == (got.report.choice is not None)


@pytest.mark.parametrize(
    ("ttt", "n", "readers"),
    [
        (READ, 1, 2),
        (READ, 3, 3),
        (TTTParams(session="s", gate="fixed", chunk_size=32), 1, 2),
        (TTTParams(session="s", gate="fixed", chunk_size=32), 3, 4),
        (replace(READ, read="session"), 1, 1),
    ],
)
def test_no_more_is_held_than_was_reserved(
    tiny_llama_dir: Path, ttt: TTTParams, n: int, readers: int
) -> None:
    core = taught(tiny_llama_dir)
    harness.submit(core, ask(tiny_llama_dir, OTHER, ttt, n=n, temperature=1.0, seed=1))
    most = 0
    while core.has_work:
        core.step()
        for group in core._lifecycle.running:
            held = {id(s.cache): s.cache.capacity for s in group.readers}
            if group.write is not None:
                cache = group.write.sequence.cache
                held[id(cache)] = cache.capacity
            assert sum(held.values()) <= group.reserved == core.stats().kv_tokens
            most = max(most, group.reserved)
    assert most == readers * 102
    assert core.stats().kv_tokens == 0


def test_what_is_remembered_needs_no_room_for_a_second_reading(tiny_llama_dir: Path) -> None:
    core = taught(tiny_llama_dir, max_kv_tokens=4 * 102)
    requests = [replace(ask(tiny_llama_dir, OTHER), request_id=str(i)) for i in range(5)]
    harness.run(core, requests[0])
    for request in requests[1:]:
        harness.submit(core, request)
    most = 0
    while core.has_work:
        core.step()
        most = max(most, core.stats().running)
    assert most == 4


def test_digest_of_a_report_is_that_of_the_weights_read(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir)
    core.sessions.create("s", TTTParams())
    fresh = hashlib.sha256(core.bank.fresh_weights.numpy().tobytes()).hexdigest()
    for ttt in (replace(harness.FIXED, session="s"), harness.FIXED):
        got = harness.generate(core, harness.text(tiny_llama_dir, 0, 40), ttt=ttt)
        assert got.report.digest == fresh
