"""The application: routes, errors and metrics around one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ponderttt import __version__
from ponderttt.engine.async_engine import AsyncEngine
from server.auth import Authentication
from server.body import BodyLimit
from server.context import Context
from server.errors import install_handlers
from server.keys import KeyRing
from server.local_only import LocalOnly
from server.metrics import Metrics
from server.request_log import RequestLog
from server.routes import adapt, chat, completions, health, models, sessions, tokens
from server.settings import Settings

_DESCRIPTION = """\
Code completion that learns your code while it serves it. The OpenAI API as its clients know it,
and an object `ttt` in requests and answers of completions: text is read chunk by chunk, and each
chunk may teach the fast weights of a session, within a budget.
"""


def create_app(engine: AsyncEngine, settings: Settings) -> FastAPI:
    """The ASGI application.

    Args:
        engine: not started yet; the application starts it, and stops it when it shuts down.
        settings: limits of requests, and how long the last ones get to finish.
    Raises:
        InvalidRequestError: the file of API keys is wrong.
    """
    ring = KeyRing(settings.api_key_file) if settings.api_key_file is not None else None
    metrics = Metrics(engine.core.model_name, engine.stats)
    engine.core.observer = metrics

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await engine.stop(settings.drain_seconds)

    app = FastAPI(
        title="PonderTTT",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        # One schema per model: what goes in for what is asked, what comes out for what is answered.
        separate_input_output_schemas=False,
    )
    app.state.context = Context(engine, settings, metrics)
    # The middleware asks for the key; this is for the documentation.
    bearer = [Security(HTTPBearer(auto_error=False))] if ring is not None else []
    for group in (completions, chat, sessions, adapt, models, tokens):
        app.include_router(group.router, dependencies=bearer)
    app.include_router(health.router)
    install_handlers(app)
    # The last one added is the outermost: what is refused is counted and logged, too.
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(Authentication, ring=ring)
    if ring is None and not settings.allow_unauthenticated:
        app.add_middleware(LocalOnly, host=settings.host)
    app.add_middleware(RequestLog)
    app.add_middleware(_CountAnswers, metrics=metrics)
    return app


class _CountAnswers:
    """Middleware: counts answers by method, route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The pattern, not the path: labels must stay few, whatever clients ask for.
                route = getattr(scope.get("route"), "path", "unknown")
                method = scope["method"] if route != "unknown" else "any"
                self._metrics.answered(method, route, message["status"])
            await send(message)

        await self._app(scope, receive, counted)
