"""Lives of requests: what they hold, how they end, and who else notices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.engine import lifecycle
from ponderttt.engine.admission import Admission
from ponderttt.engine.config import TTTDefaults
from ponderttt.engine.core import EngineCore
from ponderttt.engine.outputs import (
    Choice,
    DoneEvent,
    ErrorEvent,
    Event,
    FinishEvent,
    PromptEvent,
    TokenEvent,
    TTTReport,
)
from ponderttt.engine.report import ttt_report
from ponderttt.engine.request import AdaptRequest, GenerateRequest
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.engine.sequence import Group
from ponderttt.engine.sequence_factory import SequenceFactory
from tests.ponderttt.engine import harness, test_relay
from tests.ponderttt.engine.asking import LONG, OFF, ask, learn, make_core


def _in_queue(core: EngineCore) -> bool:
    return core.stats().waiting == 1


def _in_prefill(core: EngineCore) -> bool:
    return core.stats().running == 1 and not _started(core)


def _in_write(core: EngineCore) -> bool:
    pending = core._lifecycle.running[0].write if core._lifecycle.running else None
    return pending is not None and pending.write is not None


def _in_decode(core: EngineCore) -> bool:
    return _started(core) and core._lifecycle.running[0].write is None


def _started(core: EngineCore) -> bool:
    return any(s.generated > 3 for g in core._lifecycle.running for s in g.sequences)


@pytest.mark.parametrize("state", [_in_queue, _in_prefill, _in_write, _in_decode])
@pytest.mark.parametrize("session", ["s", None])
def test_abort_in_any_state_gives_back_everything_and_leaves_the_session(
    tiny_llama_dir: Path, state: Callable[[EngineCore], bool], session: str | None
) -> None:
    core = make_core(tiny_llama_dir, "s", max_batch_tokens=20, busy_batch_tokens=20)
    harness.adapt(core, harness.text(tiny_llama_dir, 0, 64), ttt=learn("s"))
    before, digest = harness.holdings(core), core.sessions.digest(core.sessions.get("s"))
    recorder = core.observer = harness.Recorder()
    # Four steps, so that there is a middle of a write; a decoder has nothing to write.
    ttt = TTTParams(session=session, action=Action.UPDATE_4, chunk_size=32)
    if state is _in_decode:
        ttt = TTTParams(session=session, gate="off")
    request = ask(tiny_llama_dir, 1, 64, ttt)
    got = harness.submit(core, request)
    if state is not _in_queue:
        harness.step_until(core, lambda: state(core))
    assert state(core)
    core.abort(request.request_id)
    assert harness.holdings(core) == before
    assert not core.has_work
    assert not got.ended
    assert recorder.outcomes[-1][:2] == ("abort", 64)
    assert core.sessions.digest(core.sessions.get("s")) == digest
    # And the engine is none the worse for it.
    again = harness.generate(core, harness.text(tiny_llama_dir, 2, 40), ttt=learn("s"))
    assert again.report.version_after == 4
    assert harness.holdings(core) == before


def test_abort_of_one_request_leaves_the_others_alone(tiny_llama_dir: Path) -> None:
    alone = harness.run(make_core(tiny_llama_dir), ask(tiny_llama_dir, 1, 50))[0]
    core = make_core(tiny_llama_dir)
    requests = [ask(tiny_llama_dir, number, 50) for number in range(3)]
    outcomes = [harness.submit(core, request) for request in requests]
    harness.step_until(core, lambda: _started(core))
    core.abort(requests[0].request_id)
    core.abort(requests[2].request_id)
    core.abort("unknown")
    harness.drain(core)
    assert [outcome.ended for outcome in outcomes] == [False, True, False]
    assert outcomes[1].tokens == alone.tokens


def test_requests_of_every_kind_leave_nothing_behind(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s", "t")
    harness.run(core, AdaptRequest((harness.text(tiny_llama_dir, 0, 64),), learn("s")))
    before = harness.holdings(core)
    assert before == (1, 0, {"s": 0, "t": 0})
    recorder = core.observer = harness.Recorder()
    scoring = SamplingParams(max_tokens=0, prompt_logprobs=1)
    outcomes = harness.run(
        core,
        ask(tiny_llama_dir, 1, 50),
        ask(tiny_llama_dir, 2, 50, learn("s", adapt_on="both")),
        ask(tiny_llama_dir, 3, 50, learn(None)),
        GenerateRequest(
            harness.text(tiny_llama_dir, 4, 30), SamplingParams(n=4, ignore_eos=True), OFF
        ),
        GenerateRequest(harness.text(tiny_llama_dir, 5, 30), scoring, learn("s")),
        AdaptRequest(tuple(harness.text(tiny_llama_dir, n, 700) for n in (6, 8)), learn("s")),
    )
    assert all(outcome.ended for outcome in outcomes)
    assert harness.holdings(core) == before
    assert sorted(outcome for outcome, _, _ in recorder.outcomes) == [
        "adapted", "length", "length", "length", "length", "length",
    ]  # fmt: skip


def test_events_of_a_request_come_in_order(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s")
    sampling = replace(LONG, prompt_logprobs=0, n=1)
    request = GenerateRequest(harness.text(tiny_llama_dir, 0, 40), sampling, learn("s"))
    events = harness.run(core, request)[0].events
    kinds = [type(event) for event in events]
    assert kinds.count(PromptEvent) == kinds.count(DoneEvent) == kinds.count(FinishEvent) == 1
    assert kinds.index(PromptEvent) < kinds.index(TokenEvent)
    assert kinds[-2:] == [FinishEvent, DoneEvent]
    done = events[-1]
    assert isinstance(done, DoneEvent)
    assert (done.prompt_tokens, done.generated_tokens) == (40, 40)


@pytest.mark.parametrize(
    ("ttt", "reported"),
    [(None, True), (OFF, True), (TTTParams(), True), (learn(None), True)],
)
def test_report_is_there_where_somebody_asked_or_something_was_learned(
    tiny_llama_dir: Path, ttt: TTTParams | None, reported: bool
) -> None:
    got = harness.generate(make_core(tiny_llama_dir), (5, 6, 7), harness.GREEDY, ttt)
    assert (got.done.ttt is not None) is reported


def test_report_of_a_request_that_asked_for_nothing_is_none_where_the_gate_is_off(
    tiny_llama_dir: Path,
) -> None:
    core = make_core(tiny_llama_dir, ttt=TTTDefaults(gate="off"))
    assert harness.generate(core, (5, 6, 7)).done.ttt is None
    assert core.stats().bank_occupied == 0


def test_requests_with_the_same_id_do_not_bring_the_engine_down(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir)
    twins = [
        GenerateRequest(harness.text(tiny_llama_dir, n, 40), LONG, learn(None), request_id="x")
        for n in range(2)
    ]
    first, second = (harness.submit(core, twin) for twin in twins)
    harness.drain(core)
    assert first.ended
    assert second.ended
    assert harness.holdings(core) == (0, 0, {})
    assert harness.generate(core, harness.text(tiny_llama_dir, 3, 40)).done.generated_tokens == 12


def test_request_that_cannot_go_on_fails_alone(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(tiny_llama_dir, "s")
    windows = 0
    next_window = SequenceFactory.next_window

    def second_fails(self: SequenceFactory, group: Any) -> None:
        nonlocal windows
        windows += 1
        if windows == 2:
            raise MemoryError("no room for the next window")
        next_window(self, group)

    monkeypatch.setattr(SequenceFactory, "next_window", second_fails)
    texts = (harness.text(tiny_llama_dir, 0, 40), harness.text(tiny_llama_dir, 1, 40))
    document = harness.submit(core, AdaptRequest(texts, learn("s")))
    other = harness.submit(core, ask(tiny_llama_dir, 2, 40))
    harness.drain(core)
    assert isinstance(document.error, MemoryError)
    assert other.ended
    assert harness.holdings(core) == (1, 0, {"s": 0})


def test_abort_of_everything_tells_everybody_even_where_cleaning_up_fails(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(tiny_llama_dir, max_num_seqs=2)
    outcomes = [harness.submit(core, ask(tiny_llama_dir, n, 20)) for n in range(4)]
    core.step()

    def broken(self: Admission, group: Any) -> None:
        raise RuntimeError("the bank is in disorder")

    monkeypatch.setattr(Admission, "release", broken)
    core.abort_all(RuntimeError("the end"))
    assert [str(outcome.error) for outcome in outcomes] == ["the end"] * 4


# --- ends that fail -------------------------------------------------------------------------------

#: Leaves something to be learned after the answer, which pins the session once more.
LATER = learn("s", when="background")


def ends(outcome: harness.Outcome) -> list[type[Event]]:
    """A caller hears of one end."""
    return [type(e) for e in outcome.events if isinstance(e, DoneEvent | ErrorEvent)]


def fail(*args: Any) -> Any:
    raise MemoryError("no memory for this")


@pytest.mark.parametrize("ttt", [LATER, learn("s")], ids=["background", "inline"])
def test_request_that_cannot_be_completed_ends_alone(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, ttt: TTTParams
) -> None:
    core, script = test_relay.make(tiny_llama_dir)
    before = harness.holdings(core)[1:]
    recorder = core.observer = harness.Recorder()
    broken = harness.submit(core, ask(tiny_llama_dir, 1, 64, ttt))
    other = harness.submit(core, ask(tiny_llama_dir, 2, 64))
    test_relay.settle(core)

    def report(group: Group, pending: int) -> TTTReport | None:
        return fail() if group.session is not None else ttt_report(group, pending)

    monkeypatch.setattr(lifecycle, "ttt_report", report)
    # Both arrive in the same step.
    for number in range(2):
        script.draw(*range(40), of=number)
    test_relay.settle(core)
    assert (ends(broken), ends(other)) == ([ErrorEvent], [DoneEvent])
    assert isinstance(broken.error, MemoryError)
    assert sorted(outcome for outcome, _, _ in recorder.outcomes) == ["error", "length"]
    assert harness.holdings(core)[1:] == before == (0, {"s": 0})
    core.delete_session("s")


def test_request_whose_weights_cannot_be_published_gives_back_what_it_holds(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, script = test_relay.make(tiny_llama_dir)
    recorder = core.observer = harness.Recorder()
    broken = harness.submit(core, ask(tiny_llama_dir, 1, 64, learn("s")))
    test_relay.settle(core)
    other = harness.submit(core, ask(tiny_llama_dir, 2, 64))
    test_relay.settle(core)
    monkeypatch.setattr(script, "publish", fail)
    for number in range(2):
        script.draw(*range(40), of=number)
    test_relay.settle(core)
    assert (ends(broken), ends(other)) == ([DoneEvent], [DoneEvent])
    assert [outcome for outcome, _, _ in recorder.outcomes] == ["length", "length"]
    assert harness.holdings(core)[1:] == (0, {"s": 0})
    core.delete_session("s")


def test_request_that_cannot_be_cancelled_elsewhere_gives_back_what_it_holds(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, script = test_relay.make(tiny_llama_dir)
    recorder = core.observer = harness.Recorder()
    request = ask(tiny_llama_dir, 1, 64, learn("s"))
    harness.submit(core, request)
    test_relay.settle(core)
    monkeypatch.setattr(script, "cancel", fail)
    core.abort(request.request_id)
    assert [outcome for outcome, _, _ in recorder.outcomes] == ["abort"]
    assert harness.holdings(core)[1:] == (0, {"s": 0})


def test_request_that_fails_and_cannot_be_retired_elsewhere_ends_alone(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, script = test_relay.make(tiny_llama_dir)
    broken = harness.submit(core, ask(tiny_llama_dir, 1, 64, learn("s")))
    test_relay.settle(core)
    monkeypatch.setattr(script, "publish", fail)
    script.fail(MemoryError("no memory there"))
    test_relay.settle(core)
    assert ends(broken) == [ErrorEvent]
    assert harness.holdings(core)[1:] == (0, {"s": 0})


def test_answer_that_cannot_be_retired_elsewhere_is_learned_all_the_same(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, script = test_relay.make(tiny_llama_dir)
    got = harness.submit(core, ask(tiny_llama_dir, 1, 64, LATER))
    test_relay.settle(core)
    monkeypatch.setattr(core._relay, "retire", fail)
    script.draw(*range(40))
    test_relay.settle(core)
    assert got.report.pending == core.sessions.get("s").version == 2
    assert harness.holdings(core)[1:] == (0, {"s": 0})


def test_caller_who_cannot_be_told_of_the_end_leaves_nothing_behind(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s")
    heard: list[type[Event]] = []

    def sink(event: Event) -> None:
        if isinstance(event, DoneEvent):
            raise MemoryError("no memory for the last event")
        heard.append(type(event))

    core.enqueue(core.prepare(ask(tiny_llama_dir, 1, 64, LATER), sink))
    harness.drain(core)
    assert heard.count(ErrorEvent) == 1
    assert harness.holdings(core)[1:] == (0, {"s": 0})
    core.delete_session("s")


def test_observer_who_fails_over_a_choice_makes_for_one_end(tiny_llama_dir: Path) -> None:
    class Failing(harness.Recorder):
        def chosen(self, choice: Choice) -> None:
            fail()

    core = make_core(tiny_llama_dir, "s")
    harness.adapt(core, harness.text(tiny_llama_dir, 0, 128), ttt=learn("s"))
    recorder = core.observer = Failing()
    judged = harness.submit(core, ask(tiny_llama_dir, 1, 90, LATER))
    other = harness.submit(core, ask(tiny_llama_dir, 2, 40))
    harness.drain(core)
    assert (ends(judged), ends(other)) == ([ErrorEvent], [DoneEvent])
    assert sorted(outcome for outcome, _, _ in recorder.outcomes) == ["error", "length"]
    assert harness.holdings(core)[1:] == (0, {"s": 0})
