"""Answers as server-sent events."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from sse_starlette.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from ponderttt.errors import PonderError
from server.errors import describe
from server.events import Events

_LOG = logging.getLogger(__name__)


class EventResponse(EventSourceResponse):
    """A stream of JSON objects that ends with `[DONE]`.

    A failure on the way is sent as an event `error`, after which the stream ends. When the client
    goes away, its requests are aborted.

    Args:
        objects: what to send; consumes `events`.
        events: closed in any case.
    """

    def __init__(self, objects: AsyncGenerator[dict[str, Any], None], events: Events) -> None:
        self._messages = _messages(objects)
        self._events = events
        super().__init__(self._messages, sep="\n")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._messages.aclose()
            await self._events.aclose()


async def _messages(
    objects: AsyncGenerator[dict[str, Any], None],
) -> AsyncGenerator[dict[str, str], None]:
    try:
        async for each in objects:
            yield {"data": _dump(each)}
        yield {"data": "[DONE]"}
    except Exception as error:  # the status has been sent; this is the only way to tell
        if not isinstance(error, PonderError):
            _LOG.exception("a stream has failed")
        yield {"event": "error", "data": _dump(describe(error)[1])}
    finally:
        await objects.aclose()


def _dump(value: dict[str, Any]) -> str:
    # Escaped, since some clients take U+2028 and its like for the end of a line.
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
