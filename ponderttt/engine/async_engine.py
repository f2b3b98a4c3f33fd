"""The engine behind an event loop: it runs in a thread of its own; requests are async iterators."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from ponderttt.engine.core import EngineCore
from ponderttt.engine.outputs import DoneEvent, ErrorEvent, Event, TokenEvent
from ponderttt.engine.request import Request
from ponderttt.engine.stats import EngineStats
from ponderttt.engine.threads import ThreadShare
from ponderttt.errors import NotFoundError, OverloadedError, UnavailableError

_LOG = logging.getLogger(__name__)
T = TypeVar("T")

#: Events of one request that wait to be read one by one; the tokens of further ones are joined.
MAX_PENDING_EVENTS = 256
# What is learned is to be saved even where requests get no time to finish.
_LEAST_SAVE_SECONDS = 10.0


class EventStream:
    """The events of one request, in order; closing it before the last one aborts the request.

    The engine never waits for a reader. When one falls behind, the tokens it has not taken yet are
    joined into few events, so that a slow reader costs no more than the text itself.

    Args:
        abort: called when the stream is closed early.
    """

    def __init__(self, abort: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._news = asyncio.Event()
        self._abort = abort
        self._ended = False

    def put(self, event: Event) -> None:
        """Hand over an event, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._take_in, event)
        except RuntimeError:
            # The caller's loop is closed: nobody is left to hear.
            self._abort()

    def _take_in(self, event: Event) -> None:
        self._news.set()
        if isinstance(event, TokenEvent) and len(self._events) >= MAX_PENDING_EVENTS:
            for place in range(len(self._events) - 1, -1, -1):
                earlier = self._events[place]
                if isinstance(earlier, TokenEvent) and earlier.index == event.index:
                    self._events[place] = earlier.joined(event)
                    return
        self._events.append(event)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        try:
            while not self._events:
                self._news.clear()
                await self._news.wait()
            event = self._events.popleft()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        self._ended = isinstance(event, DoneEvent | ErrorEvent)
        return event

    async def aclose(self) -> None:
        """Abort the request unless it has ended."""
        if not self._ended:
            self._ended = True
            self._abort()


class AsyncEngine:
    """Runs an `EngineCore` in its own thread.

    Args:
        core: not used by anybody else from now on.
    """

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.failure: BaseException | None = None
        self.draining = False
        self._inbox: deque[Callable[[], None]] = deque()
        # Requests in the inbox, not yet in the core's queue, and whose they are.
        self._arriving: dict[str, str | None] = {}
        self._lock = threading.Lock()  # between posting a job and closing the inbox
        self._closed = False
        self._wake = threading.Event()
        core.call_on_arrival(self._wake.set)
        self._stopping = False
        # Told by the engine's thread between its steps: within one, a request may be in no list.
        self._idle = True
        self._threads = ThreadShare()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stats = core.stats()

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self.draining and self.failure is None

    def stats(self) -> EngineStats:
        """Counts as they were after the last step."""
        return self._stats

    def submit(self, request: Request) -> EventStream:
        """Check a request and queue it.

        Returns:
            Its events; the last is a DoneEvent or an ErrorEvent.
        Raises:
            InvalidRequestError, PromptTooLongError, NotFoundError, DamagedSessionError: as
                `InputProcessor.prepare`.
            OverloadedError: too many requests wait.
            UnavailableError: not started, draining or failed.
        """
        self._check_ready()
        tenant = request.tenant
        arriving = list(self._arriving.values())
        self.core.check_room(tenant, len(arriving), arriving.count(tenant.id))
        stream = EventStream(lambda: self._abort(request.request_id))
        group = self.core.prepare(request, stream.put)

        def enqueue() -> None:
            try:
                self.core.enqueue(group)
            except OverloadedError as error:
                stream.put(ErrorEvent(error))
            self._arriving.pop(request.request_id, None)

        self._arriving[request.request_id] = tenant.id
        self._post(enqueue)
        return stream

    async def call(self, function: Callable[[EngineCore], T]) -> T:
        """Run a function in the engine's thread, between two steps; its exceptions propagate."""
        if self.failure is not None or not self._thread.is_alive():
            raise UnavailableError("the engine is not running")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, failure = None, None
            try:
                result = function(self.core)
            except BaseException as error:  # handed to the caller, who raises it
                failure = error
            with suppress(RuntimeError):  # the caller's loop is closed: nobody is left to hear
                loop.call_soon_threadsafe(settle, result, failure)

        self._post(run)
        return await future

    async def warm(self, name: str) -> None:
        """Have a stored session at hand before the engine's thread needs it.

        Raises:
            NotFoundError, DamagedSessionError, ConflictError, StoreError.
        """
        sessions = self.core.sessions
        if sessions.ahead.is_cold(name):
            # Others may wait for the same session.
            try:
                loaded = await asyncio.shield(asyncio.wrap_future(sessions.ahead.fetch(name)))
            except NotFoundError:
                # Another server may have deleted it.
                await self.call(lambda core: core.sessions.forget_cold(name))
                raise
            await self.call(lambda core: core.sessions.warm(name, loaded))

    async def find(self, name: str) -> None:
        """Have a session known here that another server may have stored meanwhile."""
        if self.core.sessions.ahead.is_unknown(name):
            await self.warm(name)

    async def refresh_sessions(self) -> None:
        """Learn of sessions that other servers of the store have made or deleted."""
        listing = await asyncio.to_thread(self.core.sessions.ahead.listing)
        await self.call(lambda core: core.sessions.refresh(listing))

    async def delete_session(self, name: str) -> None:
        """Delete a session and all that is stored of it. See `EngineCore.delete_session`."""
        await self.find(name)
        sessions = self.core.sessions
        if name not in sessions.unreadable():
            sessions.get(name)
        ahead = sessions.ahead
        async with _taken(lambda: ahead.claim_to_delete(name), lambda _: ahead.end_claim(name)):
            deleted = await self.call(lambda core: core.delete_session(name))
        if deleted is not None:
            await asyncio.shield(asyncio.wrap_future(deleted))

    async def new_session(self, name: str | None, make: Callable[[EngineCore, str], T]) -> T:
        """Call `make` in the engine's thread with a session id that the store has found free.

        Args:
            name: the id; None makes one.
            make: creates the session of this id.
        """
        ahead = self.core.sessions.ahead
        # Where it was used, there is nothing to cancel.
        async with _taken(lambda: ahead.reserve(name), ahead.cancel_reservation) as reserved:
            return await self.call(lambda core: make(core, reserved))

    async def stop(self, drain_seconds: float = 30.0) -> None:
        """Take no more requests, let those that run finish, end the thread, store all sessions.

        Args:
            drain_seconds: after this the remaining requests get an error.
        """
        self.draining = True
        deadline = time.monotonic() + drain_seconds
        while self._thread.is_alive() and time.monotonic() < deadline and self._busy():
            await asyncio.sleep(0.02)
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self.core.close, max(drain_seconds, _LEAST_SAVE_SECONDS))

    def _busy(self) -> bool:
        return bool(self._inbox) or not self._idle

    def _check_ready(self) -> None:
        if self.failure is not None:
            raise UnavailableError(f"the engine has stopped: {self.failure}")
        if self.draining:
            raise UnavailableError("the server is shutting down; try another one")
        if not self._thread.is_alive():
            raise UnavailableError("the engine has not started yet; retry shortly")

    def _abort(self, request_id: str) -> None:
        with suppress(UnavailableError):  # an engine that has stopped has ended every request
            self._post(lambda: self.core.abort(request_id))

    def _post(self, job: Callable[[], None]) -> None:
        with self._lock:
            if self._closed:
                raise UnavailableError("the engine has stopped")
            self._inbox.append(job)
        self._wake.set()

    def _run(self) -> None:
        self._threads.take()
        try:
            while not self._stopping:
                self._wake.clear()
                if self._inbox:
                    self._idle = False
                    self._take_in()
                worked = self.core.step()
                self._stats = self.core.stats()
                self._idle = not self.core.has_requests
                # `stop` may have set the event just before it was cleared above.
                if not (worked or self._inbox or self._stopping):
                    self._wake.wait(self.core.next_due())
        except BaseException as error:
            _LOG.exception("the engine has failed")
            self.failure = error
        finally:
            reason = self.failure or UnavailableError("the server has shut down")
            with self._lock:
                self._closed = True
            while self._inbox:
                try:
                    self._inbox.popleft()()
                except Exception:  # the others must hear of the end, too
                    _LOG.exception("a job of the inbox failed")
            self.core.abort_all(UnavailableError(f"the request was cut off: {reason}"))

    def _take_in(self) -> None:
        while self._inbox:
            self._inbox.popleft()()


@asynccontextmanager
async def _taken(take: Callable[[], T], give_back: Callable[[T], None]) -> AsyncIterator[T]:
    """What a thread takes, given back at the end, or once it comes where the caller is cancelled.

    Args:
        take, give_back: may wait for the store.
    """
    taking = asyncio.ensure_future(asyncio.to_thread(take))

    async def end() -> None:
        try:
            taken = await taking
        except Exception:  # nothing was taken, as the caller hears
            return
        await asyncio.to_thread(give_back, taken)

    try:
        # A thread goes on though nobody waits for it.
        yield await asyncio.shield(taking)
    finally:
        await asyncio.shield(asyncio.ensure_future(end()))
