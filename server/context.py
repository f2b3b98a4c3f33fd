"""What every route works with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from ponderttt.engine import request as engine_request
from ponderttt.engine.async_engine import AsyncEngine
from ponderttt.errors import NotFoundError
from server.events import Events, submit
from server.metrics import Metrics
from server.request_log import RequestRecord
from server.settings import Settings


@dataclass(frozen=True, slots=True)
class Context:
    """One server's parts.

    Args:
        engine: runs the requests.
        settings: fixed at start-up.
        metrics: counts.
        started: Unix time.
    """

    engine: AsyncEngine
    settings: Settings
    metrics: Metrics
    started: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        """Raise NotFoundError unless `name` is the served model (or left out)."""
        served = self.engine.core.model_name
        if name not in (None, served):
            raise NotFoundError(
                "model", f"model {name!r} does not exist here; this server serves {served!r}"
            )

    async def submit(
        self, requests: Sequence[engine_request.Request], record: RequestRecord
    ) -> Events:
        """Queue requests that belong together; PonderError where one of them is wrong."""
        for name in {r.ttt.session for r in requests if r.ttt is not None}:
            if name is not None:
                await self.engine.warm(name)
        record.requests += len(requests)
        return await submit(self.engine, requests, self.metrics.rejected, record.completed)


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


ContextDep = Annotated[Context, Depends(_context)]
