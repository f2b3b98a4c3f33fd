"""The generator that a vLLM server is for our engine.

A thread of its own runs an event loop with one task per continuation. What may pass is tried again,
from where the text has got to: no connection, an error of the server's, an adapter that is gone
because vLLM was restarted.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from filelock import FileLock, Timeout

from ponderttt.engine.generator import (
    Adapter,
    AdapterCounts,
    Arrival,
    Continuation,
    Drawn,
    Ended,
    Failed,
)
from ponderttt.engine.relay import part_seed
from ponderttt.engine.sampler import SampledToken
from ponderttt.engine.vllm.adapters import Adapters
from ponderttt.engine.vllm.api import BaseModel, VllmApi
from ponderttt.engine.vllm.config import VllmConfig
from ponderttt.engine.vllm.errors import (
    AdapterGoneError,
    VllmError,
    VllmUnreachableError,
)
from ponderttt.errors import InvalidRequestError

_LOG = logging.getLogger(__name__)
_CLOSE_SECONDS = 5.0
T = TypeVar("T")


class VllmGenerator:
    """Continues texts on a vLLM server; a `Generator`.

    Args:
        config: where the server is.
    Raises:
        VllmError: nothing like vLLM answers there.
        InvalidRequestError: the directory for adapters can't be used.
    """

    def __init__(self, config: VllmConfig) -> None:
        self.config = config
        self.on_arrival: Callable[[], None] = _nothing
        self.on_published: Callable[[float], None] = _ignore
        self._files = _AdapterFiles(config.adapter_dir)
        self._counts = AdapterCounts(slots=config.max_adapters or 1)
        self._arrived: deque[Arrival] = deque()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._chores: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        self._api, self._adapters = self.call(self._connect())
        try:
            self.version: str = self.call(self._api.version())
            self.base_model: BaseModel = self.call(self._api.base_model())
            self.call(self._unload_leftovers())
        except BaseException:
            self.close()
            raise

    async def _connect(self) -> tuple[VllmApi, Adapters]:
        # In the loop's thread: connections and locks belong to one loop.
        api = VllmApi(self.config)
        adapters = Adapters(
            api,
            self._files.directory,
            uuid4().hex[:6],
            self._counts,
            lambda seconds: self.on_published(seconds),
        )
        return api, adapters

    async def _unload_leftovers(self) -> None:
        """What a server that ended without notice has left in the same directory."""
        for name in await self._api.adapters_under(self._files.directory):
            await self._api.unload(name)
        await asyncio.to_thread(self._files.clear)

    # --- at start-up, from any thread but the loop's -------------------------------------------

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @property
    def adapter_directory(self) -> Path:
        """Where adapters are published."""
        return self._files.directory

    def tokenize(self, text: str) -> list[int]:
        """vLLM's token ids of a text."""
        return self.call(self._api.tokenize(text))

    def score(self, tokens: tuple[int, ...], adapter: Adapter | None = None) -> list[float]:
        """vLLM's log-probabilities of all tokens but the first, in nats."""

        async def scored() -> list[float]:
            async with self._model(adapter) as name:
                return await self._api.score(name, tokens)

        return self.call(scored())

    def learn_slots(self) -> int:
        """How many adapters may be loaded at once: as configured, else as vLLM's metrics say."""
        slots = self.config.max_adapters or self.call(self._api.max_loras())
        self._counts.slots = slots or 1
        return self._counts.slots

    # --- Generator -----------------------------------------------------------------------------

    def start(self, continuation: Continuation) -> None:
        """Begin to continue a text."""
        self._loop.call_soon_threadsafe(self._begin, continuation)

    def cancel(self, continuation_id: str) -> None:
        """Stop; vLLM aborts the request as its connection closes."""
        self._loop.call_soon_threadsafe(self._end, continuation_id)

    def arrivals(self) -> list[Arrival]:
        """What has come since the last call."""
        came = []
        while self._arrived:
            came.append(self._arrived.popleft())
        return came

    def publish(self, adapter: Adapter) -> None:
        """Have an adapter loaded before anybody asks for it."""
        self._loop.call_soon_threadsafe(self._publish_soon, adapter)

    def forget(self, owner: str) -> None:
        """Have the owner's adapters unloaded."""
        self._loop.call_soon_threadsafe(self._adapters.forget, owner)

    def counts(self) -> AdapterCounts:
        """A copy of the counts."""
        return replace(self._counts, errors=dict(self._counts.errors))

    def close(self) -> None:
        """Abort what runs, unload our adapters and remove their files. Safe to repeat."""
        if self._thread.is_alive():
            try:
                future = asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop)
                future.result(_CLOSE_SECONDS)
            except Exception:  # it may be vLLM that has ended
                _LOG.warning("adapters may be left in vLLM", exc_info=True)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        self._files.close()

    async def _shut_down(self) -> None:
        try:
            running = [*self._tasks.values(), *self._chores]
            for task in running:
                task.cancel()
            if running:  # one that is loading an adapter goes on until it is there
                await asyncio.wait(running, timeout=_CLOSE_SECONDS / 4)
            async with asyncio.timeout(_CLOSE_SECONDS / 2):
                await self._adapters.unload_all()
        finally:
            await self._api.aclose()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    # --- in the loop ---------------------------------------------------------------------------

    def _begin(self, text: Continuation) -> None:
        task = self._loop.create_task(self._run(text))
        self._tasks[text.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(text.id, None))

    def _end(self, continuation_id: str) -> None:
        task = self._tasks.get(continuation_id)
        if task is not None:
            task.cancel()

    def _publish_soon(self, adapter: Adapter) -> None:
        chore = self._loop.create_task(self._publish(adapter))
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)

    def _put(self, arrival: Arrival) -> None:
        self._arrived.append(arrival)
        self.on_arrival()

    async def _run(self, text: Continuation) -> None:
        try:
            stopped = await self._continue(text)
        except VllmError as error:
            self._put(Failed(text.id, error))
        except Exception as error:  # the engine's thread must hear of it, whatever it is
            _LOG.exception("continuation %s failed", text.id)
            self._put(Failed(text.id, error))
        else:
            self._put(Ended(text.id, stopped))

    async def _continue(self, text: Continuation) -> bool:
        """Draw all tokens, in as many attempts as it takes; returns whether the text was stopped.

        Raises:
            VllmError: the last attempt's.
        """
        part, waits = text, list(self.config.retries)
        drawn: list[SampledToken] = []
        while True:
            before = len(drawn)
            try:
                return await self._attempt(part, drawn)
            except VllmError as error:
                self._count(error)
                if len(drawn) > before:
                    waits = list(self.config.retries)
                if not (waits and _may_pass(error) and (not drawn or _resumable(text))):
                    raise
                self._counts.retries += 1
                wait = waits.pop(0)
                _LOG.warning("continuation %s: %s; trying again", text.id, error)
                if len(drawn) == text.max_tokens:
                    return False
                part = _rest(text, drawn)
                # Whoever has only forgotten the adapter can be asked again at once.
                await asyncio.sleep(0.0 if isinstance(error, AdapterGoneError) else wait)

    async def _attempt(self, text: Continuation, drawn: list[SampledToken]) -> bool:
        received = 0
        async with (
            self._model(text.adapter) as name,
            aclosing(self._api.stream(name, text)) as pieces,
        ):
            async for piece in pieces:
                if piece.tokens:
                    received += len(piece.tokens)
                    drawn.extend(piece.tokens)
                    self._put(Drawn(text.id, piece.tokens))
                if piece.end == "stop":
                    return True
                if piece.end == "length" and received == text.max_tokens:
                    return False
                if piece.end is not None:
                    raise VllmUnreachableError(
                        f"vLLM ended a text after {received} of {text.max_tokens} tokens "
                        f"({piece.end}); its log may say why"
                    )
        raise VllmUnreachableError("vLLM ended an answer without a reason")

    def _model(self, adapter: Adapter | None) -> AbstractAsyncContextManager[str]:
        if adapter is None:
            return nullcontext(self.base_model.name)
        return self._adapters.use(adapter)

    async def _publish(self, adapter: Adapter) -> None:
        try:
            await self._adapters.publish(adapter)
        except VllmError as error:
            self._count(error)
            _LOG.warning("adapter of %s was not published ahead: %s", adapter.owner, error)
        except Exception:  # a full disk, say; the next request hears of it
            _LOG.exception("adapter of %s was not published ahead", adapter.owner)
        # Nothing arrives, but the engine looks at the counts when it wakes.
        self.on_arrival()

    def _count(self, error: VllmError) -> None:
        self._counts.errors[error.kind] = self._counts.errors.get(error.kind, 0) + 1


def _may_pass(error: VllmError) -> bool:
    # After a time-out the caller has waited long enough.
    return isinstance(error, VllmUnreachableError | AdapterGoneError)


def _resumable(text: Continuation) -> bool:
    """These penalties count generated tokens, which in a new request belong to the prompt."""
    return not (text.sampling.presence_penalty or text.sampling.frequency_penalty)


def _rest(text: Continuation, drawn: list[SampledToken]) -> Continuation:
    return replace(
        text,
        tokens=(*text.tokens, *(token.token_id for token in drawn)),
        max_tokens=text.max_tokens - len(drawn),
        seed=part_seed(text.seed, 0, len(drawn)),
    )


class _AdapterFiles:
    """The directory for adapters, which `close` removes.

    Several servers may be given one place, as the replicas of a cluster are: each takes the first
    directory there that no other has locked. One whose server was killed is taken up by the next,
    which finds in it what is to be unloaded.

    Args:
        place: where to make it; None: among temporary files.
    Raises:
        InvalidRequestError: it can't be made.
    """

    def __init__(self, place: Path | None) -> None:
        self._lock: FileLock | None = None
        if place is None:
            self.directory = Path(tempfile.mkdtemp(prefix="ponderttt-adapters-"))
            return
        try:
            self.directory, self._lock = _first_free(place.expanduser().resolve())
        except OSError as error:
            raise InvalidRequestError(
                "vllm_adapter_dir", f"{place} can't be written: {error.strerror}"
            ) from error

    def clear(self) -> None:
        """Remove what is in it."""
        for child in self.directory.iterdir():
            shutil.rmtree(child, ignore_errors=True)

    def close(self) -> None:
        """Remove it and what is in it."""
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._lock is not None:
            self._lock.release()


def _first_free(place: Path) -> tuple[Path, FileLock]:
    """A directory of our own, and its lock; below `place`, since whatever is in it is removed."""
    place.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        directory = place / f"ponderttt-adapters-{number}"
        lock = FileLock(f"{directory}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            continue  # another server's
        try:
            directory.mkdir(exist_ok=True)
        except OSError:
            lock.release()
            raise
        return directory, lock
    raise AssertionError("counting does not end")


def _nothing() -> None:
    """Nobody listens yet."""


def _ignore(seconds: float) -> None:
    """Nobody listens yet."""
