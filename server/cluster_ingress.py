"""The way into a cluster: finds the session that a request is about, and passes both on.

It holds no model and needs no PyTorch. Ray Serve chooses the replica: the one that has the session,
else one that has few. Where that replica turns out not to have it, because another one is about
to give it up or has died, the request is sent again until the session is free.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ponderttt.errors import (
    InvalidRequestError,
    OverloadedError,
    SessionElsewhereError,
    UnavailableError,
)
from ponderttt.sessions.names import is_session_id
from server.auth import Authentication
from server.body import BodyLimit, parse_json
from server.cluster_metrics import IngressMetrics
from server.cluster_replica import Batch, Call, Elsewhere
from server.cluster_settings import ClusterSettings
from server.disconnect import ClientGoneError, while_connected
from server.errors import describe, install_handlers
from server.keys import ApiKey, KeyRing, session_name
from server.local_only import LocalOnly
from server.request_log import RequestLog

_LOG = logging.getLogger(__name__)

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_COMPLETIONS = ("/v1/completions", "/v1/chat/completions")
_OF_SESSION = re.compile(r"/v1/sessions/([^/]+)(/[a-z]+)?")
# Done twice, these do something else than done once.
_ONCE = ("/fork", "/rollback", "/snapshot")
_SENT_ON = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string",
            "client", "server")  # fmt: skip
_REQUEST_ID = b"x-request-id"
# Bodies above this are parsed outside the event loop.
_LARGE = 1 << 16
# Between two attempts to find a session, seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 0.5
# All replicas are asked for so long, seconds.
_ASK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Target:
    """What a request is about.

    Args:
        session: as the caller names it; None: none.
        is_new: it is to be made.
        repeatable: sending it again after a replica died does no harm.
    """

    session: str | None = None
    is_new: bool = False
    repeatable: bool = True


async def target_of(method: str, path: str, body: bytes) -> Target:
    """The session in a request's path or body; whatever is wrong with it the replica finds out."""
    if found := _OF_SESSION.fullmatch(path):
        return Target(found[1], repeatable=found[2] not in _ONCE)
    if method != "POST":
        return Target()
    if path == "/v1/sessions":
        return Target(_text(await _parsed(body), "id"), is_new=True, repeatable=False)
    if path in _COMPLETIONS:
        value = await _parsed(body)
        return Target(_text(value.get("ttt") if isinstance(value, dict) else None, "session"))
    return Target()


async def _parsed(body: bytes) -> Any:
    try:
        return await asyncio.to_thread(parse_json, body) if len(body) > _LARGE else parse_json(body)
    except InvalidRequestError:
        return None


def _text(value: Any, field: str) -> str | None:
    found = value.get(field) if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


class Ingress:
    """Sends requests to replicas.

    Args:
        settings: of the cluster.
        replicas: Serve's handle of the replicas.
    """

    def __init__(self, settings: ClusterSettings, replicas: Any) -> None:
        self._replicas = replicas
        self._patience = settings.patience_seconds
        self.metrics = IngressMetrics()

    async def relay(self, request: Request) -> Response:
        """A replica's answer to a request.

        Raises:
            SessionElsewhereError: no replica could have the session in time.
            UnavailableError: the replica died, or there is none.
        """
        body = await request.body()
        scope = request.scope
        target = await target_of(scope["method"], scope["path"], body)
        key: ApiKey | None = scope["state"]["key"]
        name = session_name(key, target.session) if target.session is not None else None
        if name is not None and not is_session_id(name):
            name = None
        sent_on = {field: scope.get(field) for field in _SENT_ON} | {"headers": _headers(scope)}
        call = Call(sent_on, body, None if target.is_new else name)
        try:
            answer, first = await while_connected(request, self._begin(call, name, target))
        except ClientGoneError:
            return Response(status_code=499)
        return Relayed(answer, first)

    async def _begin(self, call: Call, name: str | None, target: Target) -> tuple[Any, Batch]:
        """The stream of an answer, and its first batch."""
        begun, pause, died = time.monotonic(), _FIRST_PAUSE, False
        while True:
            waited = time.monotonic() - begun
            stream = self._replicas.options(
                stream=True, multiplexed_model_id=name or ""
            ).answer.remote(Call(call.scope, call.body, call.session, waited))
            try:
                first = await anext(stream)
            except asyncio.CancelledError:
                stream.cancel()
                raise
            except Exception as error:
                if not _is_death(error):
                    raise _translated(error) from error
                if died or not target.repeatable:
                    raise UnavailableError(
                        "the replica died before it answered; see whether it did what it was asked "
                        "to, then retry"
                    ) from error
                died = True
                self.metrics.repeats.labels("died").inc()
                continue
            if not isinstance(first, Elsewhere):
                return stream, first
            if waited > self._patience:
                raise SessionElsewhereError("session", first.message)
            self.metrics.repeats.labels("elsewhere").inc()
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE)

    async def ready(self) -> int:
        """How many replicas take requests."""
        return sum(await self._ask_all("ready"))

    async def page(self) -> bytes:
        """All metrics."""
        return self.metrics.page(await self._ask_all("metrics"))

    async def _ask_all(self, method: str) -> list[Any]:
        try:
            answers = await self._replicas.broadcast(method).results_async(
                timeout_s=_ASK_SECONDS, return_exceptions=True
            )
        except Exception as error:
            # None is there, or none answered in time.
            _LOG.warning("the replicas can't be asked for %s: %r", method, error)
            return []
        return [each for each in answers if not isinstance(each, BaseException)]


def _headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The request's, with the id that the log here knows it by."""
    record = scope["state"]["record"]
    kept = [(bytes(k), bytes(v)) for k, v in scope["headers"] if k != _REQUEST_ID]
    return [*kept, (_REQUEST_ID, record.id.encode())]


class Relayed(Response):
    """A replica's answer, passed on as it comes.

    Args:
        stream: the batches after the first; cancelled where nobody listens to the end.
        first: batch.
    """

    def __init__(self, stream: Any, first: Batch) -> None:
        super().__init__()
        self._stream = stream
        self._first = first
        self._is_event_stream = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        work = asyncio.ensure_future(self._send_all(send))
        watcher = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            if not work.done():
                self._stream.cancel()
            work.cancel()
            watcher.cancel()
            await asyncio.gather(work, watcher, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        try:
            async for batch in self._batches():
                for message in batch:
                    self._look_at(message)
                    await send(message)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if not (self._is_event_stream and _is_death(error)):
                raise
            # The status has been sent; this is the only way to tell.
            lost = UnavailableError("the replica died amid this answer; retry")
            data = json.dumps(describe(lost)[1], separators=(",", ":"))
            event = f"event: error\ndata: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": False})

    async def _batches(self) -> AsyncIterator[Batch]:
        yield self._first
        async for batch in self._stream:
            yield batch

    def _look_at(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_event_stream = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message["headers"]
            )


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _is_death(error: BaseException) -> bool:
    from ray.exceptions import RayActorError

    return isinstance(error, RayActorError)


def _translated(error: Exception) -> Exception:
    """Serve's refusals in our words."""
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    if isinstance(error, BackPressureError):
        return OverloadedError("all replicas are busy; retry shortly")
    if isinstance(error, DeploymentUnavailableError):
        return UnavailableError("no replica can be started; the log of the cluster says why")
    return error


class _OneRequestId:
    """Middleware: leaves it to Serve's proxy to tell clients their request's id.

    Args:
        app: the application inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def without(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(k, v) for k, v in message["headers"] if k.lower() != _REQUEST_ID]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, without)


def create_ingress(settings: ClusterSettings, replicas: Any) -> FastAPI:
    """The application that clients of a cluster talk to.

    Args:
        settings: of the cluster.
        replicas: Serve's handle of the replicas.
    Raises:
        PonderError: the file of API keys is wrong.
    """
    ring = KeyRing(settings.api_key_file) if settings.api_key_file is not None else None
    ingress = Ingress(settings, replicas)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> dict[str, str | int]:
        found = await ingress.ready()
        if not found:
            raise UnavailableError("no replica takes requests yet")
        return {"status": "ready", "replicas": found}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await ingress.page(), media_type=CONTENT_TYPE_LATEST)

    app.add_api_route("/{path:path}", ingress.relay, methods=_METHODS, response_model=None)
    install_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(Authentication, ring=ring)
    if ring is None and not settings.allow_unauthenticated:
        app.add_middleware(LocalOnly, host=settings.host)
    app.add_middleware(RequestLog)
    app.add_middleware(_OneRequestId)
    return app
