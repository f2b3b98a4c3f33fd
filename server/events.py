"""The event streams of several requests as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from ponderttt.engine.async_engine import AsyncEngine, EventStream
from ponderttt.engine.outputs import DoneEvent, ErrorEvent, Event
from ponderttt.engine.request import Request
from ponderttt.errors import OverloadedError


class Events:
    """Events of all requests of one call. Close it when nobody listens any more.

    Args:
        streams: one per request.
        refused: called where a request turns out to be one too many.
        completed: called with the end of each request that is answered.
    """

    def __init__(
        self,
        streams: Sequence[EventStream],
        refused: Callable[[], None],
        completed: Callable[[DoneEvent], None],
    ) -> None:
        self._streams = streams
        self._refused = refused
        self._completed = completed
        self._heard = self._listen()
        self._first: tuple[int, Event] | None = None

    async def begin(self) -> None:
        """Wait for the first event, which `listen` then begins with.

        Raises:
            Exception: the error of a request that fails before it does anything.
        """
        self._first = await anext(self._heard)

    async def listen(self) -> AsyncGenerator[tuple[int, Event], None]:
        """Each event with the index of its request, to the last DoneEvent.

        Raises:
            Exception: the error of a request that fails; the others are left running.
        """
        if self._first is not None:
            yield self._first
        async with aclosing(self._heard) as heard:
            async for each in heard:
                yield each

    async def _listen(self) -> AsyncGenerator[tuple[int, Event], None]:
        if len(self._streams) == 1:
            async for event in self._streams[0]:
                yield 0, self._checked(event)
            return
        # Short: what is not read yet waits in the streams, which join it.
        queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue(1)
        tasks = [
            asyncio.ensure_future(_forward(index, stream, queue))
            for index, stream in enumerate(self._streams)
        ]
        try:
            left = len(tasks)
            while left:
                index, event = await queue.get()
                left -= isinstance(event, DoneEvent)
                yield index, self._checked(event)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def aclose(self) -> None:
        """Abort whatever has not ended."""
        await self._heard.aclose()
        for stream in self._streams:
            await stream.aclose()

    def _checked(self, event: Event) -> Event:
        if isinstance(event, ErrorEvent):
            if isinstance(event.error, OverloadedError):
                self._refused()
            raise event.error
        if isinstance(event, DoneEvent):
            self._completed(event)
        return event


async def submit(
    engine: AsyncEngine,
    requests: Sequence[Request],
    refused: Callable[[], None],
    completed: Callable[[DoneEvent], None],
) -> Events:
    """Queue requests that belong together; where one is wrong, none of them runs.

    Raises:
        PonderError: whatever is wrong with one of them.
    """
    if len(requests) > 1:
        for request in requests:
            engine.core.prepare(request, _ignore)
    streams: list[EventStream] = []
    try:
        for request in requests:
            streams.append(engine.submit(request))
    except BaseException as error:
        if isinstance(error, OverloadedError):
            refused()
        await Events(streams, refused, completed).aclose()
        raise
    return Events(streams, refused, completed)


async def _forward(
    index: int, stream: EventStream, queue: asyncio.Queue[tuple[int, Event]]
) -> None:
    async for event in stream:
        await queue.put((index, event))


def _ignore(event: Event) -> None:
    """For requests that are only checked."""
