"""One line in the log for each request: who, what, how it ended; never what was said."""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ponderttt.errors import InvalidRequestError
from ponderttt.sessions.names import check_session_id
from server.errors import describe, error_response
from server.logs import REQUEST_ID

if TYPE_CHECKING:
    # The way in of a cluster logs, too, and does without PyTorch.
    from ponderttt.engine.outputs import DoneEvent

_LOG = logging.getLogger("server.requests")
_TROUBLE = logging.getLogger(__name__)

_HEADER = b"x-request-id"
_VALID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(slots=True)
class RequestRecord:
    """What the log says of one HTTP request; filled in as it becomes known.

    Args:
        id: the client's X-Request-Id where it is a fit one, else random.
        key_id: of the API key.
        session: as the caller names it.
        requests, done: how many the engine was given, and has completed.
        error: code of what ended a stream early.
    """

    id: str
    key_id: str | None = None
    session: str | None = None
    requests: int = 0
    done: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    learned_chunks: int = 0
    error: str | None = None
    status: int | None = None
    begun: float = field(default_factory=time.monotonic)

    def completed(self, event: DoneEvent) -> None:
        """One of its requests is complete."""
        self.done += 1
        self.prompt_tokens += event.prompt_tokens
        self.generated_tokens += event.generated_tokens
        if event.ttt is not None:
            self.learned_chunks += event.ttt.version_after - event.ttt.version_before

    @property
    def outcome(self) -> str:
        """`ok`, `refused` (4xx), `failed` (5xx, or an error within a stream), `aborted`."""
        if self.status is None or self.status == 499:
            return "aborted"
        if self.status >= 500 or self.error is not None:
            return "failed"
        if self.status >= 400:
            return "refused"
        return "ok" if self.done == self.requests else "aborted"

    def fields(self) -> dict[str, object]:
        """What goes into the line, beside method, route and status."""
        counted = {
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "learned_chunks": self.learned_chunks,
        }
        return {
            "outcome": self.outcome,
            "seconds": round(time.monotonic() - self.begun, 6),
            "key_id": self.key_id,
            "session": _fit(self.session),
            "error": self.error,
            **(counted if self.requests else {}),
        }


def _fit(session: str | None) -> str | None:
    """A session's name, if it can be one; whatever else a client sent stays out of the log."""
    if session is None:
        return None
    try:
        check_session_id("session", session.removeprefix("~"))
    except InvalidRequestError:
        return None
    return session


class RequestLog:
    """Middleware: gives every request an id and a `RequestRecord`, and logs how it ended.

    Args:
        app: the application inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope["headers"]))
        scope.setdefault("state", {})["record"] = record
        # Not reset at the end: what the server itself logs of a failure comes after it.
        REQUEST_ID.set(record.id)

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {
                    **message,
                    "headers": [*message.get("headers", ()), (_HEADER, record.id.encode())],
                }
            await send(message)

        try:
            await self._app(scope, receive, labelled)
        except ClientDisconnect:
            pass  # before all of its body had come; nobody is left to answer
        except Exception as error:
            if record.status is not None:
                record.error = describe(error)[0].code
                raise  # half-way through an answer, the connection is all that can be cut
            # Answered here: further out it would have no id, and would not be counted.
            _TROUBLE.exception("a request failed unexpectedly")
            await error_response(error)(scope, receive, labelled)
        finally:
            _report(scope, record)


def _report(scope: Scope, record: RequestRecord) -> None:
    # The pattern: paths that lead nowhere may hold anything.
    route = getattr(scope.get("route"), "path", "unknown")
    method = scope["method"] if route != "unknown" else "any"
    where = {"method": method, "route": route, "status": record.status}
    _LOG.info("%s %s %s", method, route, record.status, extra={"fields": where | record.fields()})


def _request_id(headers: list[tuple[bytes, bytes]]) -> str:
    given = [value for name, value in headers if name == _HEADER]
    if len(given) == 1 and _VALID.fullmatch(given[0]):
        return given[0].decode("ascii")
    return uuid.uuid4().hex
