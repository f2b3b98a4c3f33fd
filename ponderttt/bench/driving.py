"""Driving an engine step by step, with a clock at its events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.core import EngineCore
from ponderttt.engine.observer import NullObserver, PhaseKind, StepRecord
from ponderttt.engine.outputs import ChunkEvent, DoneEvent, ErrorEvent, Event, TokenEvent
from ponderttt.engine.request import AdaptRequest, GenerateRequest, Request
from ponderttt.engine.sampling_params import SamplingParams

OFF = TTTParams(gate="off")


@dataclass(slots=True)
class Heard:
    """The events of one request and when they came, seconds of the performance counter.

    `after_chunk` is called whenever a chunk has been learned or skipped.
    """

    request: Request
    events: list[Event] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    after_chunk: Callable[[], None] | None = None

    def hear(self, event: Event) -> None:
        """Take an event."""
        self.events.append(event)
        self.times.append(time.perf_counter())
        if self.after_chunk is not None and isinstance(event, ChunkEvent):
            self.after_chunk()

    @property
    def ended(self) -> bool:
        """Whether the last event has come; raises what the request failed with."""
        last = self.events[-1] if self.events else None
        if isinstance(last, ErrorEvent):
            raise last.error
        return isinstance(last, DoneEvent)

    @property
    def tokens(self) -> list[int]:
        """New token ids."""
        return [t for e in self.events if isinstance(e, TokenEvent) for t in e.token_ids]

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(tokens, loss before) of each chunk that was learned or tried."""
        reports = [e.report for e in self.events if isinstance(e, ChunkEvent)]
        return [
            (r.end - max(r.start, 1), r.loss_before)
            for r in reports
            if r.loss_before is not None and r.action is not Action.SKIP
        ]


def greedy(prompt: Sequence[int], tokens: int, ttt: TTTParams = OFF) -> GenerateRequest:
    """A request for exactly `tokens` new tokens."""
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return GenerateRequest(tuple(prompt), sampling, ttt)


def sampled(prompt: Sequence[int], tokens: int, ttt: TTTParams, seed: int) -> GenerateRequest:
    """As `greedy`, but drawn: what a session greedily repeats, it has learned and skips."""
    sampling = SamplingParams(max_tokens=tokens, temperature=1.0, seed=seed, ignore_eos=True)
    return GenerateRequest(tuple(prompt), sampling, ttt)


def submit(
    core: EngineCore, requests: Iterable[Request], after_chunk: Callable[[], None] | None = None
) -> list[Heard]:
    """Queue requests; their events come in as the engine steps."""
    heard = []
    for request in requests:
        one = Heard(request, after_chunk=after_chunk)
        core.enqueue(core.prepare(request, one.hear))
        heard.append(one)
    return heard


def step_until(core: EngineCore, condition: Callable[[], bool]) -> None:
    """Step until `condition()` holds; raises RuntimeError where the engine has nothing to do."""
    while not condition():
        if not core.step():
            raise RuntimeError("the engine has nothing left to do, but a request has not ended")


def drain(core: EngineCore) -> None:
    """Step until all is done, background learning too."""
    while core.has_work:
        core.step()


def run(
    core: EngineCore, requests: Iterable[Request], after_chunk: Callable[[], None] | None = None
) -> list[Heard]:
    """Run requests side by side to their ends; `after_chunk` as of `Heard`."""
    heard = submit(core, requests, after_chunk)
    step_until(core, lambda: all(one.ended for one in heard))
    return heard


def timed_run(
    core: EngineCore, requests: Iterable[Request], after_chunk: Callable[[], None] | None = None
) -> tuple[float, list[Heard]]:
    """Seconds from the first request's arrival to the last one's end."""
    begun = time.perf_counter()
    heard = run(core, requests, after_chunk)
    return time.perf_counter() - begun, heard


def taught(core: EngineCore, name: str, document: Sequence[int]) -> str:
    """Make a session, teach it a document by UPDATE_1 as one chunk or more; returns its name."""
    core.sessions.create(name, TTTParams())
    chunk = max(16, min(len(document), 256))
    ttt = TTTParams(session=name, action=Action.UPDATE_1, chunk_size=chunk)
    run(core, [AdaptRequest((tuple(document),), ttt)])
    return name


def mean_loss(losses: Iterable[tuple[int, float]]) -> float:
    """Mean over tokens of chunk losses, nats per token; NaN where there are none."""
    pairs = list(losses)
    total = sum(count for count, _ in pairs)
    return sum(count * loss for count, loss in pairs) / total if total else float("nan")


class PhaseTimes(NullObserver):
    """Keeps the phases that an engine ran."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def step(self, record: StepRecord) -> None:
        """Keep it."""
        self.records.append(record)

    def seconds(self, kind: PhaseKind, sequences: int) -> list[float]:
        """Of the phases of a kind in which exactly so many sequences took part."""
        return [r.seconds for r in self.records if r.kind == kind and len(r.tags) == sequences]
