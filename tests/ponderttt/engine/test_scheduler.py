"""Which phase runs next: bounded phases, fair shares, order within a session; no model needed."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.chunking import chunk_spans
from ponderttt.adaptation.params import TTTParams
from ponderttt.adaptation.update import Write
from ponderttt.engine.config import EngineConfig, TTTDefaults
from ponderttt.engine.observer import PhaseKind
from ponderttt.engine.outputs import Event
from ponderttt.engine.request import AdaptRequest, GenerateRequest
from ponderttt.engine.resolve import resolve_ttt
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.engine.scheduler import DecodePlan, Plan, PrefillPlan, Scheduler, WritePlan
from ponderttt.engine.sequence import Group, PendingWrite, Sequence, Span, Status
from ponderttt.models.kv_cache import KVCache
from ponderttt.sessions.session import Session

CACHE = KVCache(1, 1, 1, 1, torch.device("cpu"), torch.float32)
TTT = resolve_ttt(TTTParams(chunk_size=16), TTTParams(), TTTDefaults(), "threshold", False)


def ignore(event: Event) -> None:
    """Nobody listens."""


def make_session(name: str) -> Session:
    return Session(name, TTTParams(), ephemeral=False, state=None)


def make_group(
    session: Session | None,
    prompt: int,
    *,
    new: int = 1,
    chunk: int = 0,
    background: bool = False,
    windows: int = 0,
) -> Group:
    """A request of `prompt` tokens, cut into chunks; `windows` more of the same follow."""
    ids = tuple(range(1, prompt + 1))
    request: GenerateRequest | AdaptRequest
    if windows:
        request = AdaptRequest((ids,) * (windows + 1), TTTParams(session="s"))
    else:
        request = GenerateRequest(ids, SamplingParams(max_tokens=new))
    group = Group(request, session, True, TTT, ignore, background=background)
    group.windows.extend((n + 1, ids) for n in range(windows))
    add_sequence(group, prompt, chunk)
    return group


def add_sequence(group: Group, prompt: int, chunk: int) -> Sequence:
    sequence = Sequence(
        group, 0, list(range(1, prompt + 1)), prompt, CACHE, known=prompt if group.background else 0
    )
    if chunk:
        sequence.spans.extend(Span(*span, "prompt") for span in chunk_spans(0, prompt, chunk))
    group.sequences = [sequence]
    return sequence


def decoding(session: Session | None = None) -> Group:
    group = make_group(session, 4, new=50)
    group.sequences[0].computed = 4
    group.sequences[0].status = Status.DECODE
    return group


def want_write(group: Group, rows: int, *, begun: bool = False) -> Group:
    """Let a group wait for an update."""
    span = Span(1, rows + 1, "prompt")
    group.write = PendingWrite(group.sequences[0], span, "hash", Action.UPDATE_1, "fixed", 1.0, 0.0)
    if begun:
        begin(group.write)
    return group


def begin(pending: PendingWrite) -> None:
    pending.write = cast(Write, object())


def make_scheduler(**changes: Any) -> Scheduler:
    values: dict[str, Any] = {"max_batch_tokens": 64, "busy_batch_tokens": 16}
    return Scheduler(EngineConfig(**(values | changes)))


def prefill(plan: Plan | None) -> list[tuple[Sequence, int]]:
    assert isinstance(plan, PrefillPlan)
    return list(plan.pieces)


def writers(plan: Plan | None) -> list[Group]:
    assert isinstance(plan, WritePlan)
    return list(plan.groups)


# --- single decisions -----------------------------------------------------------------------------


def test_next_without_anything_to_do_is_none() -> None:
    scheduler = make_scheduler()
    assert scheduler.next([]) is None
    group = make_group(None, 4)
    group.sequences[0].status = Status.FINISHED
    assert scheduler.next([group]) is None


def test_next_with_prompts_alone_reads_them_in_order_up_to_the_room() -> None:
    groups = [make_group(None, 40), make_group(None, 40), make_group(None, 40)]
    first, second, third = (group.sequences[0] for group in groups)
    assert prefill(make_scheduler().next(groups)) == [(first, 40), (second, 24)]
    first.computed, second.computed = 39, 24
    assert prefill(make_scheduler().next(groups)) == [(first, 1), (second, 16), (third, 40)]


def test_next_with_several_prompts_reads_an_equal_part_of_each() -> None:
    groups = [make_group(None, 300), make_group(None, 90), make_group(None, 300)]
    scheduler = make_scheduler(max_batch_tokens=384)
    counts = [count for _, count in prefill(scheduler.next(groups))]
    assert counts == [128, 90, 128]
    # But no piece is so small that a phase is mostly overhead.
    many = [make_group(None, 300) for _ in range(9)]
    assert [count for _, count in prefill(scheduler.next(many))] == [64] * 6


def test_next_with_chunks_reads_no_sequence_past_the_end_of_its_chunk() -> None:
    group = make_group(None, 40, chunk=16)
    sequence = group.sequences[0]
    for computed, count in ((0, 16), (10, 6)):
        sequence.computed = computed
        assert prefill(make_scheduler().next([group])) == [(sequence, count)]
    sequence.spans.popleft()
    sequence.spans.popleft()
    sequence.computed = 32
    assert prefill(make_scheduler().next([group])) == [(sequence, 8)]


def test_next_with_decoders_alone_decodes_them_all_at_once() -> None:
    groups = [decoding(), decoding(), decoding()]
    plan = make_scheduler().next(groups)
    assert plan == DecodePlan(tuple(group.sequences[0] for group in groups))


def test_next_while_others_decode_reads_only_a_small_piece() -> None:
    waiting = make_group(None, 40)
    plan = make_scheduler().next([decoding(), waiting])
    assert prefill(plan) == [(waiting.sequences[0], 16)]


def test_next_while_a_group_waits_for_its_write_leaves_its_sequences_alone() -> None:
    group = want_write(decoding(make_session("a")), 8)
    assert writers(make_scheduler().next([group])) == [group]
    other = decoding()
    assert isinstance(make_scheduler().next([group, other]), WritePlan)
    scheduler = make_scheduler()
    scheduler.account("write", 1.0)
    assert scheduler.next([group, other]) == DecodePlan((other.sequences[0],))


def test_next_after_a_prefill_gives_decoding_its_share_of_the_time() -> None:
    scheduler = make_scheduler(decode_share=0.75)
    groups = [decoding(), make_group(None, 400)]
    assert isinstance(scheduler.next(groups), PrefillPlan)
    scheduler.account("prefill", 1.0)
    for _ in range(3):
        assert isinstance(scheduler.next(groups), DecodePlan)
        scheduler.account("decode", 1.0)
    assert isinstance(scheduler.next(groups), PrefillPlan)


def test_next_with_writes_of_one_session_steps_one_of_them() -> None:
    session = make_session("a")
    first = want_write(make_group(session, 8), 4)
    second = want_write(make_group(session, 8), 4)
    other = want_write(make_group(make_session("b"), 8), 4)
    assert writers(make_scheduler().next([first, second, other])) == [first, other]


def test_next_with_a_write_that_has_begun_lets_it_finish_first() -> None:
    session = make_session("a")
    first = want_write(make_group(session, 8), 4)
    begun = want_write(make_group(session, 8), 4, begun=True)
    assert writers(make_scheduler().next([first, begun])) == [begun]


def test_next_with_writes_of_one_session_takes_the_one_that_waits_longer() -> None:
    # Else a long document of the same session would push every request's update back for ever.
    session = make_session("a")
    document, request = make_group(session, 8, windows=9), make_group(session, 8)
    want_write(request, 4)
    want_write(document, 4)
    assert writers(make_scheduler().next([document, request])) == [request]


def test_next_with_more_writes_than_room_takes_the_ones_that_wait_longer() -> None:
    groups = [make_group(make_session(name), 8) for name in "abc"]
    for group in reversed(groups):
        want_write(group, 32)
    assert writers(make_scheduler().next(groups)) == [groups[2], groups[1]]


def test_next_with_one_write_beyond_the_room_takes_it_alone() -> None:
    big = want_write(make_group(make_session("a"), 40), 100)
    small = want_write(make_group(make_session("b"), 8), 1)
    assert writers(make_scheduler().next([big, small])) == [big]
    scheduler = make_scheduler()
    assert writers(scheduler.next([big, small, decoding()])) == [big]


def test_next_with_prefills_and_writes_passes_over_writes_only_twice() -> None:
    scheduler = make_scheduler()
    groups = [make_group(None, 4000), want_write(make_group(make_session("a"), 8), 4)]
    kinds = []
    for _ in range(6):
        plan = scheduler.next(groups)
        kinds.append(type(plan))
        scheduler.account("prefill", 0.001)
    assert kinds == [PrefillPlan, PrefillPlan, WritePlan] * 2


def test_next_while_requests_run_leaves_the_background_alone() -> None:
    later = make_group(make_session("a"), 40, chunk=16, background=True)
    for busy in (
        decoding(),
        make_group(None, 8),
        want_write(make_group(make_session("b"), 8), 4),
    ):
        plan = make_scheduler().next([later, busy])
        served = (
            plan.sequences
            if isinstance(plan, DecodePlan)
            else [s for s, _ in plan.pieces]
            if isinstance(plan, PrefillPlan)
            else [s for g in writers(plan) for s in g.sequences]
        )
        assert list(served) == busy.sequences
    assert prefill(make_scheduler().next([later])) == [(later.sequences[0], 16)]
    # Alone, too, its phases are short: somebody may come.
    whole = make_group(make_session("a"), 40, background=True)
    assert prefill(make_scheduler().next([whole])) == [(whole.sequences[0], 16)]


def test_next_with_a_background_write_that_has_begun_finishes_it_among_requests() -> None:
    session = make_session("a")
    begun = want_write(make_group(session, 40, chunk=16, background=True), 16, begun=True)
    waiting = want_write(make_group(make_session("b"), 40, background=True), 16)
    mine = want_write(make_group(session, 8), 8)
    assert writers(make_scheduler().next([waiting, begun, mine])) == [begun]


def test_next_in_the_background_learns_the_answers_of_a_session_in_order() -> None:
    session, other = make_session("a"), make_session("b")
    first = make_group(session, 40, chunk=16, background=True)
    second = make_group(session, 40, chunk=16, background=True)
    third = make_group(other, 40, chunk=16, background=True)
    pieces = prefill(
        make_scheduler(max_batch_tokens=128, busy_batch_tokens=128).next([first, second, third])
    )
    assert pieces == [(first.sequences[0], 16), (third.sequences[0], 16)]
    want_write(first, 16)
    third.sequences[0].status = Status.FINISHED
    assert writers(make_scheduler().next([first, second, third])) == [first]


# --- simulated runs -------------------------------------------------------------------------------


@dataclass
class Simulation:
    """An engine of bookkeeping only: phases take random times, gates decide at random."""

    draws: random.Random
    scheduler: Scheduler
    config: EngineConfig
    groups: list[Group]
    max_new: int
    chunk: int
    prompts: int
    phases: list[tuple[PhaseKind, float, bool]] = field(default_factory=list)
    steps_left: dict[str, int] = field(default_factory=dict)
    unserved: dict[str, int] = field(default_factory=dict)
    longest_wait: int = 0

    def run(self) -> None:
        for _ in range(20_000):
            if not self.groups:
                return
            plan = self.scheduler.next(self.groups)
            assert plan is not None, "work is left and no phase runs"
            self._check(plan)
            self._note_waiting(plan)
            seconds = self.draws.choice([0.001, 0.01, 0.05, 0.2]) * (0.5 + self.draws.random())
            kind = self._do(plan)
            decoders = any(s.status is Status.DECODE for s in self._runnable(background=False))
            self.phases.append((kind, seconds, decoders))
            self.scheduler.account(kind, seconds)
        raise AssertionError("not finished: somebody starves")

    def _runnable(self, *, background: bool) -> list[Sequence]:
        return [
            s
            for g in self.groups
            if g.write is None and g.background is background
            for s in g.sequences
            if s.status is not Status.FINISHED
        ]

    def _check(self, plan: Plan) -> None:
        busy = any(s.status is Status.DECODE for s in self._runnable(background=False))
        small = busy or (isinstance(plan, PrefillPlan) and plan.pieces[0][0].group.background)
        room = self.config.busy_batch_tokens if small else self.config.max_batch_tokens
        interactive = bool(self._runnable(background=False)) or any(
            g.write is not None for g in self.groups if not g.background
        )
        match plan:
            case PrefillPlan(pieces):
                assert 0 < sum(count for _, count in pieces) <= room
                assert len({s.replays for s, _ in pieces}) == 1
                for sequence, count in pieces:
                    assert sequence.group.write is None
                    assert sequence.status is Status.PREFILL
                    assert 1 <= count <= sequence.prefill_end - sequence.computed
                    assert not (sequence.group.background and interactive)
            case DecodePlan(sequences):
                assert sequences
                for sequence in sequences:
                    assert sequence.group.write is None
                    assert sequence.status is Status.DECODE
            case WritePlan(groups):
                pendings = [g.write for g in groups if g.write is not None]
                assert len(pendings) == len(groups) > 0
                assert len(groups) == 1 or sum(p.rows for p in pendings) <= room
                owners = [g.session.owner for g in groups if g.session is not None]
                assert len(owners) == len(set(owners))
                for group, pending in zip(groups, pendings, strict=True):
                    if group.background and interactive:
                        assert pending.write is not None, "begun while requests run"

    def _note_waiting(self, plan: Plan) -> None:
        """Count, per request, the phases besides decoding since it was last served."""
        match plan:
            case PrefillPlan(pieces):
                served = {s.group.id for s, _ in pieces}
            case DecodePlan():
                return
            case WritePlan(groups):
                served = {g.id for g in groups}
        for group in self.groups:
            waits = not group.background and group.id not in served
            decodes = any(s.status is Status.DECODE for s in group.sequences)
            if waits and (group.write is not None or not decodes):
                self.unserved[group.id] = self.unserved.get(group.id, 0) + 1
                self.longest_wait = max(self.longest_wait, self.unserved[group.id])
            else:
                self.unserved[group.id] = 0

    def _do(self, plan: Plan) -> PhaseKind:
        match plan:
            case PrefillPlan(pieces):
                for sequence, count in pieces:
                    sequence.computed += count
                    self._after_read(sequence)
                return "prefill"
            case DecodePlan(sequences):
                for sequence in sequences:
                    sequence.tokens.append(1)
                    sequence.computed += 1
                    if sequence.generated >= self.max_new:
                        sequence.status = Status.FINISHED
                        self._advance(sequence.group)
                return "decode"
            case WritePlan(groups):
                for group in groups:
                    self._step(group)
                return "write"

    def _after_read(self, sequence: Sequence) -> None:
        group = sequence.group
        if sequence.computed == sequence.prompt_len:
            generates = not (group.is_adapt or group.background)
            sequence.status = Status.DECODE if generates else Status.FINISHED
        if sequence.spans and sequence.computed == sequence.spans[0].end:
            span = sequence.spans.popleft()
            action = self.draws.choice(list(Action))
            if action is not Action.SKIP:
                group.write = PendingWrite(sequence, span, "h", action, "fixed", 1.0, 0.0)
        self._advance(group)

    def _step(self, group: Group) -> None:
        pending = group.write
        assert pending is not None
        assert group.session is not None
        if pending.write is None:
            others = (g for g in self.groups if g is not group and g.session is group.session)
            assert not any(g.write is not None and g.write.write for g in others), "overlap"
            begin(pending)
            self.steps_left[group.id] = pending.action.steps
        self.steps_left[group.id] -= 1
        if self.steps_left[group.id] == 0:
            group.write = None
            self._advance(group)

    def _advance(self, group: Group) -> None:
        if group.write is not None or any(s.status is not Status.FINISHED for s in group.sequences):
            return
        self.groups.remove(group)
        if group.windows:
            # As the engine does: the next window queues behind those who came meanwhile.
            group.windows.popleft()
            add_sequence(group, self.prompts, self.chunk)
            self.groups.append(group)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32),
    requests=st.integers(1, 8),
    sessions=st.integers(1, 4),
    chunk=st.sampled_from([16, 24, 40]),
    share=st.sampled_from([0.2, 0.5, 0.8]),
    busy_room=st.sampled_from([16, 128]),
)
def test_phases_of_any_run_are_bounded_fair_and_in_order(
    seed: int, requests: int, sessions: int, chunk: int, share: float, busy_room: int
) -> None:
    draws = random.Random(seed)
    owners = [make_session(f"s{n}") for n in range(sessions)]
    config = EngineConfig(
        max_batch_tokens=4 * busy_room, busy_batch_tokens=busy_room, decode_share=share
    )
    groups = []
    for _ in range(requests):
        kind = draws.choice(["plain", "learning", "learning", "document", "background"])
        length = draws.randint(1, 90)
        owner = None if kind == "plain" else draws.choice(owners)
        groups.append(
            make_group(
                owner,
                length,
                chunk=0 if kind == "plain" else chunk,
                background=kind == "background",
                windows=draws.randint(1, 4) if kind == "document" else 0,
            )
        )
    run = Simulation(draws, Scheduler(config), config, groups, draws.randint(1, 30), chunk, 60)
    run.run()
    _check_shares(run, share)
    # Before a request is served again, each other one reads a window of 90 tokens at most, in
    # pieces of 16, and takes four steps for each of its chunks of 16 or more.
    assert run.longest_wait <= (requests - 1) * (6 + 4 * 6) + 3


def _check_shares(run: Simulation, share: float) -> None:
    """After every other phase, decoding ran for its share before the next one."""
    owed = 0.0
    for kind, seconds, decoders in run.phases:
        if kind == "decode":
            owed -= seconds
        else:
            assert owed <= 1e-9, "a phase ran while decoding was owed time"
            owed = seconds * share / (1.0 - share)
        if not decoders:
            owed = 0.0


def test_request_behind_an_endless_document_is_served_while_others_decode() -> None:
    config = EngineConfig(max_batch_tokens=64, busy_batch_tokens=16)
    scheduler = Scheduler(config)
    document = make_group(make_session("a"), 64, windows=1)
    groups = deque([document, decoding(), make_group(None, 8)])
    request = groups[2].sequences[0]
    for phase in range(40):
        plan = scheduler.next(groups)
        if isinstance(plan, PrefillPlan):
            for sequence, count in plan.pieces:
                sequence.computed += count
            if request.computed == 8:
                assert phase < 10
                return
            if document.sequences[0].computed == 64:
                groups.remove(document)
                add_sequence(document, 64, 0)
                groups.append(document)
        scheduler.account("decode" if isinstance(plan, DecodePlan) else "prefill", 0.01)
    pytest.fail("the request was never read")
