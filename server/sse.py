"""Answers as server-sent events."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.types import Receive, Scope, Send

from ponderttt.errors import PonderError
from server.errors import describe
from server.events import Events
from server.request_log import RequestRecord

_LOG = logging.getLogger(__name__)


class EventResponse(EventSourceResponse):
    """A stream of JSON objects that ends with `[DONE]`.

    A failure on the way is sent as an event `error`, after which the stream ends. When the client
    goes away, its requests are aborted.

    Args:
        objects: what to send; consumes `events`.
        events: closed in any case.
        stalled_seconds: a reader who takes nothing for so long is cut off.
        record: hears of what went wrong.
    """

    def __init__(
        self,
        objects: AsyncGenerator[dict[str, Any], None],
        events: Events,
        stalled_seconds: float,
        record: RequestRecord,
    ) -> None:
        self._messages = _messages(objects, record)
        self._events = events
        self._record = record
        super().__init__(self._messages, sep="\n", send_timeout=stalled_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            # Without its end the connection is closed.
            self._record.error = "stalled_reader"
            _LOG.warning("nobody has read a stream for %g s; it is cut off", self.send_timeout)
        finally:
            await self._messages.aclose()
            await self._events.aclose()


async def _messages(
    objects: AsyncGenerator[dict[str, Any], None], record: RequestRecord
) -> AsyncGenerator[dict[str, str], None]:
    try:
        async for each in objects:
            yield {"data": _dump(each)}
        yield {"data": "[DONE]"}
    except Exception as error:  # the status has been sent; this is the only way to tell
        if not isinstance(error, PonderError):
            _LOG.exception("a stream has failed")
        kind, body = describe(error)
        record.error = kind.code
        yield {"event": "error", "data": _dump(body)}
    finally:
        await objects.aclose()


def _dump(value: dict[str, Any]) -> str:
    # Escaped, since some clients take U+2028 and its like for the end of a line.
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
