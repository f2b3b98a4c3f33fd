"""Whether the server lives, whether it takes requests, and what it counts."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST

from ponderttt.errors import UnavailableError
from server.context import ContextDep
from server.routes.common import ERRORS

router = APIRouter(tags=["health"])


@router.get("/health")
async def health() -> dict[str, str]:
    """200 as long as the process lives."""
    return {"status": "alive"}


@router.get("/ready", responses=ERRORS)
async def ready(context: ContextDep) -> dict[str, str]:
    """200 while requests are taken, else 503 with the reason."""
    engine = context.engine
    if engine.failure is not None:
        raise UnavailableError("the engine has failed; its log says why. Restart the server")
    if engine.draining:
        raise UnavailableError("the server is shutting down")
    if not engine.ready:
        raise UnavailableError("the engine has not started yet")
    return {"status": "ready"}


@router.get("/metrics", response_class=Response)
async def metrics(context: ContextDep) -> Response:
    """Counts in Prometheus' text format."""
    return Response(context.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
async def root() -> RedirectResponse:
    """To the documentation."""
    return RedirectResponse("/docs")
