"""Adapters in vLLM: published, loaded, shared by requests, unloaded least recently used first.

Each version gets a name and a directory of its own. vLLM can load new weights under an old name
(`load_inplace`), but then requests that are running change their weights in mid-text, and its
prefix cache, which goes by name and path, keeps serving keys and values of the old ones.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ponderttt.engine.generator import Adapter, AdapterCounts
from ponderttt.engine.vllm.api import VllmApi
from ponderttt.engine.vllm.errors import AdapterGoneError, PublishError, VllmError

_LOG = logging.getLogger(__name__)

# vLLM reads an adapter's files again where it has dropped it from memory; a request that is being
# aborted may make it do so once more.
_KEEP_FILES_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class Loaded:
    """An adapter in vLLM.

    Args:
        name: in vLLM, and of its directory.
        owner, version: of the weights.
        pins: continuations that read it now.
        outdated: goes as soon as nobody reads it.
    """

    name: str
    owner: str
    version: int
    pins: int = 0
    outdated: bool = False


class Adapters:
    """The adapters that one of our servers keeps loaded in vLLM. To be used in one event loop.

    Args:
        api: of the vLLM server.
        directory: of the adapters' directories; nobody else's.
        tag: part of every name, so that two of our servers can share a vLLM.
        counts: what is counted here.
        on_published: hears how long publishing took, in seconds.
    """

    def __init__(
        self,
        api: VllmApi,
        directory: Path,
        tag: str,
        counts: AdapterCounts,
        on_published: Callable[[float], None],
    ) -> None:
        self._api = api
        self._directory = directory
        self._tag = tag
        self._counts = counts
        self._on_published = on_published
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._one_at_a_time = asyncio.Lock()
        self._loading: Loaded | None = None
        self._freed = asyncio.Event()
        self._unloads: set[asyncio.Task[None]] = set()
        self._removals: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def use(self, adapter: Adapter) -> AsyncIterator[str]:
        """The adapter's name in vLLM, where it stays loaded until the block ends.

        Waits while all slots are in use.

        Raises:
            VllmError: vLLM doesn't load it.
        """
        found = await self._acquire(adapter)
        try:
            yield found.name
        except AdapterGoneError:
            # Loaded anew at the next attempt.
            if self._loaded.get(found.name) is found:
                del self._loaded[found.name]
                self._counts.loaded = len(self._loaded)
            raise
        finally:
            self._release(found)

    async def publish(self, adapter: Adapter) -> None:
        """Load an adapter before it is needed, where that takes no slot from one in use."""
        busy = sum(each.pins > 0 for each in self._loaded.values())
        if self._name(adapter) not in self._loaded and busy < self._counts.slots:
            self._release(await self._load(adapter))

    def forget(self, owner: str) -> None:
        """Unload what belongs to an owner, as soon as nobody reads it."""
        for each in list(self._loaded.values()):
            if each.owner == owner:
                self._retire(each)
        if self._loading is not None and self._loading.owner == owner:
            self._loading.outdated = True

    async def unload_all(self) -> None:
        """Unload everything, whether or not somebody reads it."""
        for each in list(self._loaded.values()):
            _in_background(self._unload(each), self._unloads)
        await asyncio.gather(*self._unloads)

    def _name(self, adapter: Adapter) -> str:
        owner = adapter.owner.replace(":", "-")
        return f"{owner}.v{adapter.version}.{adapter.digest[:12]}.{self._tag}"

    async def _acquire(self, adapter: Adapter) -> Loaded:
        found = self._loaded.get(self._name(adapter))
        return await self._load(adapter) if found is None else self._found(found)

    def _found(self, each: Loaded) -> Loaded:
        self._counts.hits += 1
        self._loaded.move_to_end(each.name)
        each.pins += 1
        return each

    def _release(self, each: Loaded) -> None:
        each.pins -= 1
        if each.pins == 0:
            self._freed.set()
            if each.outdated:
                self._retire(each)

    async def _load(self, adapter: Adapter) -> Loaded:
        """Publish and load; returns the adapter with a pin."""
        async with self._one_at_a_time:
            name = self._name(adapter)
            if name in self._loaded:  # by somebody who was before us at the lock
                return self._found(self._loaded[name])
            for each in list(self._loaded.values()):
                if each.owner == adapter.owner and each.version < adapter.version:
                    each.outdated = True
                    if each.pins == 0:
                        await self._unload(each)
            await self._make_room()
            found = Loaded(name, adapter.owner, adapter.version, pins=1)
            await self._to_the_end(adapter, found)
            return found

    async def _to_the_end(self, adapter: Adapter, found: Loaded) -> None:
        """Publish and load, even where the caller is cancelled amid it.

        Half of it can't be taken back: a thread is writing, or vLLM is loading.
        """
        self._loading = found
        work = asyncio.get_running_loop().create_task(self._publish_and_load(adapter, found))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait({work})
            if work.exception() is None:
                self._release(found)
            raise
        finally:
            self._loading = None

    async def _publish_and_load(self, adapter: Adapter, found: Loaded) -> None:
        begun = time.monotonic()
        directory = self._directory / found.name
        try:
            await asyncio.to_thread(self._write, adapter, directory)
            await self._api.load(found.name, directory)
        except VllmError:
            # After a time-out it may be loaded yet, and nobody would know.
            _in_background(self._remove_later(found.name, unload=True), self._removals)
            raise
        self._loaded[found.name] = found
        self._counts.loads += 1
        self._counts.loaded = len(self._loaded)
        self._on_published(time.monotonic() - begun)

    async def _make_room(self) -> None:
        while len(self._loaded) >= self._counts.slots:
            idle = next((each for each in self._loaded.values() if each.pins == 0), None)
            if idle is not None:
                self._counts.evictions += 1
                await self._unload(idle)
            else:
                self._freed.clear()
                await self._freed.wait()

    def _write(self, adapter: Adapter, directory: Path) -> None:
        """Appear under the final name all at once; a name stands for the same weights always."""
        if directory.exists():
            return
        unfinished = directory.with_name(f".{directory.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            adapter.write(unfinished)
            unfinished.rename(directory)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise PublishError(
                f"the adapter can't be written to {self._directory} ({error.strerror}); see "
                "whether its disk is full, or give another directory with --vllm-adapter-dir"
            ) from error

    def _retire(self, each: Loaded) -> None:
        each.outdated = True
        if each.pins == 0:
            _in_background(self._unload(each), self._unloads)

    async def _unload(self, each: Loaded) -> None:
        if self._loaded.get(each.name) is not each:
            return
        del self._loaded[each.name]
        self._counts.loaded = len(self._loaded)
        self._counts.unloads += 1
        try:
            await self._api.unload(each.name)
        except VllmError as error:
            # Nobody asks for the name again; if vLLM is down, it has forgotten it anyway.
            _LOG.warning("adapter %s was not unloaded: %s", each.name, error)
        _in_background(self._remove_later(each.name), self._removals)

    async def _remove_later(self, name: str, *, unload: bool = False) -> None:
        await asyncio.sleep(_KEEP_FILES_SECONDS)
        if name not in self._loaded:
            if unload:
                with suppress(VllmError):
                    await self._api.unload(name)
            await asyncio.to_thread(shutil.rmtree, self._directory / name, ignore_errors=True)


def _in_background(work: Coroutine[Any, Any, None], among: set[asyncio.Task[None]]) -> None:
    task = asyncio.get_running_loop().create_task(work)
    # The loop itself holds no strong reference to its tasks.
    among.add(task)
    task.add_done_callback(among.discard)
