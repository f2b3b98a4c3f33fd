"""Runs the application and stops it gently."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from ponderttt.engine.async_engine import AsyncEngine
from ponderttt.errors import PonderError

_LOG = logging.getLogger("uvicorn.error")

# Seconds that answers get to be sent after the engine has made them.
_FLUSH_SECONDS = 5


class DrainingServer(uvicorn.Server):
    """A server that, told to stop, goes on answering while its running requests finish.

    The first SIGTERM or SIGINT begins the drain: what runs may finish, new requests get 503, and
    so does /ready, so that a load balancer looks elsewhere. A second one cuts off what still runs.
    Either way the process then ends with exit code 0.

    Args:
        config: uvicorn's.
        engine: what is drained.
        drain_seconds: how long.
        on_ready: called when requests are taken.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        engine: AsyncEngine,
        drain_seconds: float,
        on_ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._on_ready = on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if not self.should_exit:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the drain; called by the signal handler."""
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if self._drain is None:
            _LOG.info("Stopping: running requests get %g s to finish", self._drain_seconds)
            self._drain = asyncio.ensure_future(self._drained(self._drain_seconds))
        else:
            _LOG.info("Stopping at once")
            self._drain.cancel()
            self._drain = asyncio.ensure_future(self._drained(0.0))

    async def _drained(self, seconds: float) -> None:
        await self._engine.stop(seconds)
        clock = asyncio.get_running_loop().time
        until = clock() + _FLUSH_SECONDS
        while self.server_state.tasks and clock() < until:
            await asyncio.sleep(0.02)
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, before anything that takes time.

    Raises:
        PonderError: the address is taken or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise PonderError(
            f"can't listen on {host}, port {port}: {error.strerror or error}. Choose another with "
            "--host and --port"
        ) from error
    return sock


def base_url(sock: socket.socket) -> str:
    """The URL under which a bound socket is reached from this machine."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
