"""Learning after the answer: who waits for whom, and that it comes to the same weights."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.core import EngineCore
from ponderttt.engine.request import GenerateRequest
from ponderttt.errors import ConflictError, NotFoundError
from tests.ponderttt.engine import harness


def make_core(directory: Path, *names: str, **settings: Any) -> EngineCore:
    core = harness.make_core(directory, **settings)
    for name in names or ("s",):
        core.sessions.create(name, TTTParams())
    return core


def later(session: str = "s", **settings: Any) -> TTTParams:
    values: dict[str, Any] = {
        "session": session, "gate": "fixed", "chunk_size": 32, "when": "background",
    }  # fmt: skip
    return TTTParams(**(values | settings))


def ask(
    directory: Path, number: int, length: int, ttt: TTTParams, new: int = 12
) -> GenerateRequest:
    sampling = replace(harness.GREEDY, max_tokens=new)
    return GenerateRequest(harness.text(directory, number, length), sampling, ttt)


def test_answer_comes_first_and_the_version_rises_later(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir)
    recorder = core.observer = harness.Recorder()
    got = harness.submit(core, ask(tiny_llama_dir, 0, 100, later()))
    harness.step_until(core, lambda: got.ended)
    session = core.sessions.get("s")
    assert got.report.version_before == got.report.version_after == session.version == 0
    assert (got.report.pending, got.report.chunks, got.report.when) == (4, (), "background")
    assert [record.kind for record in recorder.steps].count("write") == 0
    assert core.stats().background == 1
    assert core.stats().running == 0
    assert core.has_work
    assert not core.has_requests
    harness.drain(core)
    assert session.version == 3
    assert [(c.start, c.end, c.reason) for c in recorder.chunks] == [
        (0, 32, "fixed"), (32, 64, "fixed"), (64, 96, "fixed"), (96, 100, "short"),
    ]  # fmt: skip
    # The answer was the last that its caller heard.
    assert got.chunks == []
    assert session.pins == 0
    assert core.stats().background == 0


@pytest.mark.parametrize("family", ["tiny_llama_dir", "tiny_gpt2_dir", "tiny_mistral_dir"])
def test_background_learning_comes_to_the_weights_of_inline_learning(
    family: str, request: pytest.FixtureRequest
) -> None:
    directory: Path = request.getfixturevalue(family)
    cores = []
    for when in ("inline", "background"):
        core = make_core(directory)
        for number in range(2):
            harness.run(core, ask(directory, number, 130, later(when=when)))
        cores.append(core)
    inline, background = cores
    assert inline.sessions.get("s").version == background.sessions.get("s").version == 8
    # The trunk is replayed from kept activations, chunk by chunk as inline; sums differ in order.
    torch.testing.assert_close(
        harness.weights(background, "s"), harness.weights(inline, "s"), atol=1e-5, rtol=0
    )
    one, two = background.sessions.get("s"), inline.sessions.get("s")
    assert one.learned == two.learned
    assert one.ledger.accounts == two.ledger.accounts
    assert one.loss_ema == pytest.approx(two.loss_ema, abs=1e-4)


def test_background_answer_is_that_of_the_weights_before(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir)
    harness.run(core, ask(tiny_llama_dir, 0, 100, later()))
    off = harness.run(core, ask(tiny_llama_dir, 1, 60, later(gate="off")))[0]
    got = harness.run(core, ask(tiny_llama_dir, 1, 60, later()))[0]
    assert got.tokens == off.tokens
    assert got.report.digest == off.report.digest


@pytest.mark.parametrize("adapt_on", ["prompt", "generated", "both"])
def test_background_learning_covers_what_was_asked_for(tiny_llama_dir: Path, adapt_on: str) -> None:
    core = make_core(tiny_llama_dir)
    recorder = core.observer = harness.Recorder()
    harness.run(core, ask(tiny_llama_dir, 0, 50, later(adapt_on=adapt_on, chunk_size=16), new=40))
    spans = [(c.phase, c.start, c.end) for c in recorder.chunks]
    prompt = [("prompt", at, min(at + 16, 50)) for at in range(0, 50, 16)]
    generated = [("generated", at, min(at + 16, 89)) for at in range(50, 89, 16)]
    assert spans == {"prompt": prompt, "generated": generated, "both": prompt + generated}[adapt_on]
    assert core.sessions.get("s").version == sum(end - start >= 8 for _, start, end in spans)


def test_background_learning_rests_while_a_request_runs(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s", "t")
    recorder = core.observer = harness.Recorder()
    first = harness.submit(core, ask(tiny_llama_dir, 0, 100, later("s")))
    harness.step_until(core, lambda: first.ended)
    asked = harness.submit(core, ask(tiny_llama_dir, 1, 100, later("t"), new=30))
    before = len(recorder.steps)
    harness.step_until(core, lambda: asked.ended)
    for record in recorder.steps[before:]:
        assert {tag.owner for tag in record.tags} == {"t"}
        assert record.kind != "write"
    harness.drain(core)
    assert (core.sessions.get("s").version, core.sessions.get("t").version) == (3, 3)


def test_background_write_that_has_begun_ends_while_a_request_runs(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s", "t")
    slow = TTTParams(session="s", action=Action.UPDATE_4, chunk_size=32, when="background")
    first = harness.submit(core, ask(tiny_llama_dir, 0, 64, slow))
    recorder = core.observer = harness.Recorder()
    harness.step_until(core, lambda: any(r.kind == "write" for r in recorder.steps))
    assert first.ended
    asked = harness.submit(core, ask(tiny_llama_dir, 1, 64, later("t", gate="off"), new=40))
    harness.step_until(core, lambda: core.sessions.get("s").version == 1)
    assert not asked.ended
    harness.step_until(core, lambda: asked.ended)
    assert core.sessions.get("s").version == 1
    harness.drain(core)
    assert core.sessions.get("s").version == 2


def test_request_of_the_session_while_it_learns_reads_a_whole_version(
    tiny_llama_dir: Path,
) -> None:
    core = make_core(tiny_llama_dir)
    harness.submit(core, ask(tiny_llama_dir, 0, 200, later()))
    harness.step_until(core, lambda: core.sessions.get("s").version == 2)
    digest = core.sessions.digest(core.sessions.get("s"))
    got = harness.submit(core, ask(tiny_llama_dir, 1, 40, later(gate="off")))
    harness.step_until(core, lambda: got.ended)
    assert (got.report.version_before, got.report.digest) == (2, digest)
    harness.drain(core)


def test_answers_of_a_session_are_learned_in_order(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir)
    recorder = core.observer = harness.Recorder()
    asked = [harness.submit(core, ask(tiny_llama_dir, n, 96, later())) for n in range(3)]
    harness.step_until(core, lambda: all(outcome.ended for outcome in asked))
    harness.drain(core)
    assert core.sessions.get("s").version == 9
    assert [c.index for c in recorder.chunks] == [0, 1, 2] * 3
    lone = make_core(tiny_llama_dir)
    for number in range(3):
        harness.run(lone, ask(tiny_llama_dir, number, 96, later()))
    torch.testing.assert_close(
        harness.weights(core, "s"), harness.weights(lone, "s"), atol=1e-5, rtol=0
    )


def test_background_learning_keeps_the_budget(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir)
    for number in range(3):
        harness.run(core, ask(tiny_llama_dir, number, 160, later(budget=2.0)))
    account = core.sessions.get("s").ledger.accounts["nominal"]
    assert account.chunks == 15
    assert 1.5 < account.mean <= 2.0


def test_text_learned_in_the_background_is_seen_afterwards(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir)
    for _ in range(2):
        harness.run(core, ask(tiny_llama_dir, 0, 64, later()))
    assert core.sessions.get("s").version == 2


def test_session_that_learns_in_the_background_can_be_deleted(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir)
    got = harness.submit(core, ask(tiny_llama_dir, 0, 200, later()))
    harness.step_until(core, lambda: core.sessions.get("s").version == 1)
    core.delete_session("s")
    assert got.ended
    assert not core.has_work
    assert harness.holdings(core) == (0, 0, {})
    with pytest.raises(NotFoundError):
        core.sessions.get("s")


def test_session_that_cannot_be_deleted_goes_on_learning(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir)
    got = harness.submit(core, ask(tiny_llama_dir, 0, 100, later()))
    harness.step_until(core, lambda: got.ended)
    harness.submit(core, ask(tiny_llama_dir, 1, 40, later(gate="off")))
    core.step()
    with pytest.raises(ConflictError):
        core.delete_session("s")
    harness.drain(core)
    assert core.sessions.get("s").version == 3


def test_answers_beyond_the_limit_are_not_learned_and_say_so(
    tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    core = make_core(tiny_llama_dir, max_num_seqs=2)
    outcomes = [harness.submit(core, ask(tiny_llama_dir, n, 32, later(), new=2)) for n in range(4)]
    with caplog.at_level(logging.WARNING):
        harness.drain(core)
    assert [outcome.report.pending for outcome in outcomes] == [1, 1, 0, 0]
    assert core.sessions.get("s").version == 2
    assert "still to be learned" in caplog.text


def test_waiting_sessions_get_slots_that_background_learning_holds(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "a", "b", "c", adapter_slots=1)
    outcomes = [
        harness.submit(core, ask(tiny_llama_dir, n, 64, later(name)))
        for n, name in enumerate("abc")
    ]
    harness.drain(core)
    assert all(outcome.ended for outcome in outcomes)
    assert [core.sessions.get(name).version for name in "abc"] == [2, 2, 2]


def test_abort_after_the_answer_leaves_the_learning_alone(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir)
    request = ask(tiny_llama_dir, 0, 64, later())
    got = harness.submit(core, request)
    harness.step_until(core, lambda: got.ended)
    core.abort(request.request_id)
    harness.drain(core)
    assert core.sessions.get("s").version == 2


def test_abort_before_the_answer_learns_nothing(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir)
    request = ask(tiny_llama_dir, 0, 64, later(), new=30)
    harness.submit(core, request)
    harness.step_until(core, lambda: core.stats().running == 1)
    core.abort(request.request_id)
    assert not core.has_work
    assert core.sessions.get("s").version == 0
