"""One replica of a cluster: the application of `ponderttt serve`, asked by other processes."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncGenerator, MutableMapping
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from logging.config import dictConfig
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message

from ponderttt.errors import PonderError, SessionElsewhereError
from server.cluster_settings import ClusterSettings

if TYPE_CHECKING:
    from ponderttt.engine.async_engine import AsyncEngine

_LOG = logging.getLogger(__name__)

#: Header of every answer: which replica gave it.
REPLICA_HEADER = b"x-ponderttt-replica"

# Messages of an answer that wait to be taken away.
_PENDING = 64
# A session that is elsewhere is asked for after this: until then the request may find its way.
_ASK_AFTER_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Call:
    """An HTTP request on its way to a replica.

    Args:
        scope: ASGI's, as far as it can be sent.
        body: whole.
        session: that it needs, by the engine's name; None: none, or a new one.
        waited: seconds for which it has been looking for that session.
    """

    scope: dict[str, Any]
    body: bytes
    session: str | None
    waited: float = 0.0

    @property
    def lists(self) -> bool:
        """Whether all sessions matter to it."""
        return str(self.scope["path"]) == "/v1/sessions"

    @property
    def creates(self) -> bool:
        """Whether it may make a session."""
        path = str(self.scope["path"])
        return self.scope["method"] == "POST" and (self.lists or path.endswith("/fork"))


@dataclass(frozen=True, slots=True)
class Page:
    """A replica's metrics.

    Args:
        replica: its name in Serve.
        host, pid: its machine and process.
        text: in Prometheus' format.
    """

    replica: str
    host: str
    pid: int
    text: str


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Instead of an answer: another replica has the session."""

    message: str


Batch = list[MutableMapping[str, Any]]


class Replica:
    """The model, its sessions and the application; runs as a deployment of Ray Serve.

    The sessions that it has the lock of are the models that Serve knows it to have loaded.

    Args:
        values: of the settings.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        import torch
        from ray import serve

        from ponderttt.engine.async_engine import AsyncEngine
        from ponderttt.engine.threads import run_apart
        from server.app import create_app
        from server.build import build_core
        from server.logs import log_config

        settings = ClusterSettings(**values)
        dictConfig(log_config(settings.log_format, settings.log_level))
        torch.set_num_threads(settings.replica_threads)
        self._drain_seconds = settings.drain_seconds
        self._engine = AsyncEngine(run_apart(lambda: build_core(settings)))
        self._app = create_app(self._engine, settings)
        self._engine.start()
        self.name: str = serve.get_replica_context().replica_id.unique_id

    async def __del__(self) -> None:
        """Called by Serve when the requests have ended: store all sessions, let go of them."""
        if hasattr(self, "_engine"):  # not where it could not even be built
            await self._engine.stop(self._drain_seconds)

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica for which this raises."""
        if self._engine.failure is not None:
            raise RuntimeError(f"the engine has failed: {self._engine.failure}")

    async def hold(self, name: str) -> Held:
        """Tell Serve that a session is here; wrapped by `serve.multiplexed`."""
        return Held(self._engine, name)

    async def answer(self, call: Call) -> AsyncGenerator[Batch | Elsewhere, None]:
        """The ASGI messages that answer a request, in batches as they come."""
        if call.session is not None:
            try:
                await self._engine.warm(call.session)
            except SessionElsewhereError as error:
                if call.waited > _ASK_AFTER_SECONDS:
                    await asyncio.to_thread(self._engine.core.sessions.ahead.ask_for, call.session)
                yield Elsewhere(str(error))
                return
            except PonderError:
                pass  # the application meets it, too, and has the words for it
            else:
                await self._tell_serve(call.session)
        if call.lists or call.creates:
            with suppress(PonderError):  # an older list is better than none
                await self._engine.refresh_sessions()
        async for batch in exchange(self._app, call):
            yield [self._signed(message) for message in batch]
        if call.creates:
            for name in await self._engine.call(lambda core: core.sessions.here()):
                await self._tell_serve(name)

    async def _tell_serve(self, name: str) -> None:
        # Apart from the request: what Serve begins here for good would be cancelled with it.
        await asyncio.create_task(self.hold(name), context=Context())

    def _signed(self, message: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if message["type"] != "http.response.start":
            return message
        return {**message, "headers": [*message["headers"], (REPLICA_HEADER, self.name.encode())]}

    async def ready(self) -> bool:
        """Whether it takes requests."""
        return self._engine.ready

    async def metrics(self) -> Page:
        """What it counts."""
        text = self._app.state.context.metrics.render().decode()
        return Page(self.name, socket.gethostname(), os.getpid(), text)


class Held:
    """A session as Serve sees it: a model that is loaded here.

    Args:
        engine: that has it.
        name: the engine's.
    """

    def __init__(self, engine: AsyncEngine, name: str) -> None:
        self._engine = engine
        self._name = name
        self._left = False

    def __del__(self) -> None:
        """Called by Serve to make room, and by Python: leave the session to the store, once."""
        if not self._left:
            self._left = True
            self._engine.core.sessions.ahead.leave(self._name)


async def exchange(app: ASGIApp, call: Call) -> AsyncGenerator[Batch, None]:
    """What an application sends in answer to a request; closing this is the client's disconnect.

    Args:
        app: whatever it raises it has answered and logged.
        call: the request.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue(_PENDING)
    body: bytes | None = call.body
    gone = asyncio.Event()

    async def receive() -> Message:
        nonlocal body
        if body is not None:
            message = {"type": "http.request", "body": body, "more_body": False}
            body = None
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app({**call.scope, "asgi": {"version": "3.0"}, "state": {}}, receive, sent.put)
        except Exception:
            _LOG.exception("a request failed")
        await sent.put(None)

    task = asyncio.ensure_future(run())
    try:
        while (message := await sent.get()) is not None:
            batch: Batch = [message]
            while not sent.empty() and (message := sent.get_nowait()) is not None:
                batch.append(message)
            yield batch
            if message is None:
                return
    finally:
        gone.set()
        # Told that the client is gone, it ends by itself; what it still sends goes nowhere.
        while not task.done():
            while not sent.empty():
                sent.get_nowait()
            await asyncio.wait({task}, timeout=0.01)
