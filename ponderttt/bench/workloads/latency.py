"""What a user waits for: the first token, and the next one while somebody else learns."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.bench.driving import (
    OFF,
    Heard,
    PhaseTimes,
    drain,
    greedy,
    run,
    step_until,
    submit,
    timed_run,
)
from ponderttt.bench.lab import Lab
from ponderttt.bench.texts import Prompt, TextStream
from ponderttt.bench.workload import Comparison, Sample, Side, Target
from ponderttt.engine.core import EngineCore
from ponderttt.engine.request import AdaptRequest


class SeenPrompt:
    """Time to the first token of a prompt that was sent before, the session updated in between."""

    name = "seen-prompt"
    unit = "s"
    comparisons = (
        Comparison(
            "time to first token, prompt seen before, session updated in between",
            "the same prompt cold",
            "seen",
            "cold",
            Target(0.4, 0.3, "lower"),
        ),
    )

    def open(self, lab: Lab, stack: ExitStack) -> Mapping[str, Side]:
        """The cold request is the one that the seen one repeats."""
        core = lab.core()
        rounds = lab.rounds(self.name, 1, lab.pick(1024, 128))
        lessons = lab.rounds(f"{self.name}/lessons", 1, lab.pick(256, 32))
        measured: dict[int, tuple[float, float]] = {}

        def both(number: int) -> tuple[float, float]:
            if number not in measured:
                measured[number] = self._cold_and_seen(
                    core, f"{self.name}-{number}", rounds[number][0], lessons[number][0]
                )
            return measured[number]

        return {
            "seen": lambda number: Sample(both(number)[1]),
            "cold": lambda number: Sample(both(number)[0]),
        }

    def _cold_and_seen(
        self, core: EngineCore, name: str, prompt: Prompt, lesson: Prompt
    ) -> tuple[float, float]:
        core.sessions.create(name, TTTParams())
        reads = TTTParams(session=name, gate="off")
        cold, _ = timed_run(core, [greedy(prompt, 1, reads)])
        chunk = max(16, len(lesson))
        learns = TTTParams(session=name, action=Action.UPDATE_1, chunk_size=chunk)
        run(core, [AdaptRequest((lesson,), learns)])
        seen, _ = timed_run(core, [greedy(prompt, 1, reads)])
        core.delete_session(name)
        return cold, seen


class DecodeDuringWrite:
    """Four streams that decode, alone or while one session learns documents without a pause."""

    name = "decode-during-write"
    unit = "tokens/s"
    comparisons = (
        Comparison(
            "decode speed of 4 others while one session writes",
            "alone",
            "beside a writer",
            "alone",
            Target(0.4, 0.6),
        ),
    )

    def open(self, lab: Lab, stack: ExitStack) -> Mapping[str, Side]:
        """The extra figure is the longest gap between two tokens of a stream, in milliseconds."""
        core, new = lab.core(), lab.pick(64, 8)
        rounds = lab.rounds(self.name, 4, lab.pick(128, 16))
        documents = lab.stream(f"{self.name}/documents")
        length, chunk = lab.pick(1024, 128), lab.pick(256, 32)

        def alone(number: int) -> Sample:
            return _decode(core, rounds[number], new, None)

        def beside(number: int) -> Sample:
            name = f"{self.name}-{number}"
            core.sessions.create(name, TTTParams())
            ttt = TTTParams(session=name, action=Action.UPDATE_1, chunk_size=chunk)
            sample = _decode(core, rounds[number], new, _Writer(core, ttt, documents, length))
            core.delete_session(name)
            return sample

        return {"beside a writer": beside, "alone": alone}


class _Writer:
    """A client that hands in the next document as soon as the last one is learned."""

    def __init__(self, core: EngineCore, ttt: TTTParams, texts: TextStream, length: int) -> None:
        self._core, self._ttt = core, ttt
        self._texts, self._length = texts, length
        self._last: Heard | None = None

    def keep_busy(self) -> None:
        """Submit a document unless one is being learned."""
        if self._last is None or self._last.ended:
            request = AdaptRequest((self._texts.take(self._length),), self._ttt)
            (self._last,) = submit(self._core, [request])

    def stop(self) -> None:
        """Take back what is not learned yet."""
        if self._last is not None and not self._last.ended:
            self._core.abort(self._last.request.request_id)


class _Gaps(PhaseTimes):
    def __init__(self) -> None:
        super().__init__()
        self.longest = 0.0

    def next_token(self, seconds: float) -> None:
        self.longest = max(self.longest, seconds)


def _decode(core: EngineCore, prompts: list[Prompt], new: int, writer: _Writer | None) -> Sample:
    """Tokens per second from the moment on at which every stream has its first token."""
    reads = _Gaps()
    core.observer = reads
    streams = submit(core, [greedy(prompt, new) for prompt in prompts])
    # The reads of the prompts come first; every read ends with a token.
    step_until(core, lambda: sum(r.kind == "decode" for r in reads.records) > 0)
    before = sum(r.tokens for r in reads.records if r.kind == "decode") + len(prompts)
    core.observer = gaps = _Gaps()
    begun = time.perf_counter()
    while not all(stream.ended for stream in streams):
        if writer is not None:
            writer.keep_busy()
        core.step()
    seconds = time.perf_counter() - begun
    if writer is not None:
        writer.stop()
    drain(core)
    tokens = len(prompts) * new - before
    return Sample(tokens / seconds, {"longest gap, ms": gaps.longest * 1e3})


class BackgroundFirstToken:
    """Time to the first token of a request that is to be learned after its answer."""

    name = "background-first-token"
    unit = "s"
    comparisons = (
        Comparison(
            "time to first token, when: background",
            "gate off",
            "background",
            "off",
            Target(1.05, 1.0, "lower"),
        ),
    )

    def open(self, lab: Lab, stack: ExitStack) -> Mapping[str, Side]:
        """Each side has prompts of its own; learning is done before the next measurement."""
        core, length = lab.core(), lab.pick(1024, 128)
        background = lab.rounds(f"{self.name}/background", 1, length)
        off = lab.rounds(f"{self.name}/off", 1, length)

        def learned_later(number: int) -> Sample:
            name = f"{self.name}-{number}"
            core.sessions.create(name, TTTParams())
            ttt = TTTParams(session=name, action=Action.UPDATE_1, when="background")
            seconds, _ = timed_run(core, [greedy(background[number][0], 1, ttt)])
            drain(core)
            core.delete_session(name)
            return Sample(seconds)

        def never_learned(number: int) -> Sample:
            seconds, _ = timed_run(core, [greedy(off[number][0], 1, OFF)])
            return Sample(seconds)

        return {"background": learned_later, "off": never_learned}
