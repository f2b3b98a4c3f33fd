"""The two kinds of load.

Closed: a fixed number of users, each of whom waits for an answer, thinks, and asks again. A slow
server slows its users down, which hides how it would stand up to others.

Open: requests arrive by a Poisson process, whatever the server does, as from many users who don't
know of each other. Where the server is too slow, they pile up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from clients.async_api import AsyncClient
from clients.load.ask import Asking, Measured, ask
from clients.load.recorder import Recorder
from clients.load.workload import Turn, User, Workload, arrivals
from clients.wire import LONGEST_WAIT
from ponderttt.errors import PonderError

# So many failures in a row, and nothing else: the server is gone, or the request is wrong. Until
# the server has answered anything, time-outs count as such; later, they are what a load measures.
_HOPELESS = 20
# Waited after a rejection, where the server names no time.
_PAUSE = 1.0
_TICK = 0.25


@dataclass(frozen=True, slots=True)
class Limits:
    """When to stop asking; what was asked is waited for.

    Args:
        requests: after the warm-up; None: no limit.
        seconds: with the warm-up; None: no limit.
        warmup: requests at the beginning that don't count.
        running: of an open load, at once; those that arrive beyond are recorded as failed.
    """

    requests: int | None
    seconds: float | None
    warmup: int
    running: int = 1000


@dataclass(slots=True)
class Drive:
    """One run.

    Args:
        client: that doesn't ask again by itself.
        asking: what all requests have in common.
        workload: what they ask.
        limits: when to stop.
        recorder: of what comes of them.
        tick: called four times a second, for the progress.
    """

    client: AsyncClient
    asking: Asking
    workload: Workload
    limits: Limits
    recorder: Recorder
    tick: Callable[[float], None]
    begun: float = 0.0
    _sent: int = 0
    _failures: int = 0
    _answered: bool = False
    _all_sent: asyncio.Event = field(default_factory=asyncio.Event)
    _users: dict[int, User] = field(default_factory=dict)

    async def closed(self, users: int) -> None:
        """Load by users who wait.

        Args:
            users: at once.
        Raises:
            PonderError: nothing but failures, or results can't be written.
        """
        await self._run([self._user(index) for index in range(users)])

    async def open(self, rate: float) -> None:
        """Load by requests that arrive on their own.

        Args:
            rate: requests per second.
        Raises:
            PonderError: as for `closed`.
        """
        await self._run([self._arrive(rate)])

    async def _run(self, jobs: Sequence[Coroutine[Any, Any, None]]) -> None:
        self.begun = time.perf_counter()
        ticking = asyncio.create_task(self._tick())
        try:
            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    group.create_task(job)
        except* PonderError as errors:
            # One reason is enough; the others are the same.
            raise _first(errors) from None
        finally:
            ticking.cancel()

    async def _tick(self) -> None:
        while True:
            self.tick(self._now())
            await asyncio.sleep(_TICK)

    async def _user(self, index: int) -> None:
        user = self._stream(index)
        while self._goes_on():
            turn = user.turn()
            number = self._take()
            seen = await self._ask(turn, number, time.perf_counter())
            pause = turn.think
            if seen.outcome == "rejected":
                pause = max(pause, min(seen.retry_after or _PAUSE, LONGEST_WAIT))
            if self._goes_on():
                left = self.limits.seconds
                end = float("inf") if left is None else left - self._now()
                # Who waits after the last request has been sent waits for nothing.
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(pause, max(end, 0.0))):
                        await self._all_sent.wait()

    async def _arrive(self, rate: float) -> None:
        generator = arrivals(rate, self.workload.seed)
        due = self.begun
        async with asyncio.TaskGroup() as group:
            while self._goes_on():
                due += generator.expovariate(rate)
                if self.limits.seconds is not None and due - self.begun > self.limits.seconds:
                    return
                await asyncio.sleep(due - time.perf_counter())
                turn = self._stream(generator.randrange(self.asking.sessions)).turn()
                number = self._take()
                if self.recorder.tally.running >= self.limits.running:
                    error = f"not sent: {self.limits.running} requests were running already"
                    self._record(turn, number, due, 0.0, Measured("failed", error))
                    continue
                group.create_task(self._answer(turn, number, due))

    async def _answer(self, turn: Turn, number: int, due: float) -> None:
        await self._ask(turn, number, due)

    async def _ask(self, turn: Turn, number: int, due: float) -> Measured:
        tally = self.recorder.tally
        tally.running += 1
        lag = time.perf_counter() - due
        try:
            seen = await ask(self.client, self.asking, turn, due)
        finally:
            tally.running -= 1
        self._record(turn, number, due, lag, seen)
        self._despair(seen)
        return seen

    def _record(self, turn: Turn, number: int, due: float, lag: float, seen: Measured) -> None:
        self.recorder.put({
            "request": turn.name,
            "user": turn.user,
            "number": number,
            "warmup": number < self.limits.warmup,
            "due": due - self.begun,
            "lag": lag,
            "cut": turn.cut,
            "max_tokens": turn.max_tokens,
            **seen.fields(),
        })  # fmt: skip

    def _despair(self, seen: Measured) -> None:
        self._answered = self._answered or seen.outcome in ("ok", "rejected")
        if seen.outcome in ("ok", "rejected") or (seen.outcome == "timeout" and self._answered):
            self._failures = 0
            return
        self._failures += 1
        if self._failures >= _HOPELESS:
            never = "" if self._answered else ", and none was ever answered"
            raise PonderError(
                f"{self._failures} requests failed one after another{never}; the last: {seen.error}"
            )

    def _stream(self, index: int) -> User:
        if index not in self._users:
            self._users[index] = User(self.workload, index)
        return self._users[index]

    def _goes_on(self) -> bool:
        in_time = self.limits.seconds is None or self._now() < self.limits.seconds
        return in_time and not self._all_sent.is_set()

    def _take(self) -> int:
        limits = self.limits
        self._sent += 1
        if self._sent > limits.warmup:
            self.recorder.tally.sent += 1
        if limits.requests is not None and self._sent >= limits.requests + limits.warmup:
            self._all_sent.set()
        return self._sent - 1

    def _now(self) -> float:
        return time.perf_counter() - self.begun


def _first(errors: BaseExceptionGroup[PonderError]) -> PonderError:
    for error in errors.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise errors
