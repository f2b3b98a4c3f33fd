"""Every failure as HTTP: one table from errors to statuses, one shape for all bodies.

The shape is OpenAI's: `{"error": {"message", "type", "param", "code"}}`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ponderttt.errors import (
    AdapterFormatError,
    ConflictError,
    DamagedSessionError,
    InvalidRequestError,
    ModelError,
    NotFoundError,
    OverloadedError,
    PolicyFormatError,
    PonderError,
    PromptTooLongError,
    SessionElsewhereError,
    StoreError,
    UnavailableError,
)

_LOG = logging.getLogger(__name__)

#: Seconds after which a client should try again while the server is not ready.
RETRY_UNAVAILABLE = 5
_MESSAGE_CHARS, _PARAM_CHARS = 500, 200


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How one sort of error looks from outside; `type` and `code` are OpenAI's where it has any."""

    status: int
    type: str
    code: str | None


#: Derived classes stand before their bases: the first match counts.
TABLE: tuple[tuple[type[PonderError], ErrorKind], ...] = (
    (PromptTooLongError, ErrorKind(413, "invalid_request_error", "context_length_exceeded")),
    (InvalidRequestError, ErrorKind(400, "invalid_request_error", "invalid_value")),
    (AdapterFormatError, ErrorKind(400, "invalid_request_error", "invalid_adapter")),
    (NotFoundError, ErrorKind(404, "not_found_error", "not_found")),
    (SessionElsewhereError, ErrorKind(409, "conflict_error", "session_elsewhere")),
    (ConflictError, ErrorKind(409, "conflict_error", "conflict")),
    (DamagedSessionError, ErrorKind(409, "conflict_error", "session_damaged")),
    (OverloadedError, ErrorKind(429, "rate_limit_error", "overloaded")),
    (UnavailableError, ErrorKind(503, "service_unavailable_error", "unavailable")),
    (StoreError, ErrorKind(503, "service_unavailable_error", "session_store_unavailable")),
    (ModelError, ErrorKind(500, "server_error", "model_error")),
    (PolicyFormatError, ErrorKind(500, "server_error", "policy_error")),
)

_INTERNAL = ErrorKind(500, "server_error", "internal_error")

_BY_STATUS = {
    401: ErrorKind(401, "invalid_request_error", "invalid_api_key"),
    403: ErrorKind(403, "permission_error", "insufficient_scope"),
    404: ErrorKind(404, "not_found_error", "unknown_url"),
    405: ErrorKind(405, "invalid_request_error", "method_not_allowed"),
    413: ErrorKind(413, "invalid_request_error", "body_too_large"),
    415: ErrorKind(415, "invalid_request_error", "unsupported_media_type"),
}


class BodyTooLargeError(Exception):
    """The request's body exceeds the limit."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body exceeds the limit of {limit} bytes; send less at a time")


def error_body(kind: ErrorKind, message: str, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape; what it echoes of the request is cut short here."""
    message = _cut(message, _MESSAGE_CHARS)
    param = None if param is None else _cut(param, _PARAM_CHARS)
    return {"error": {"message": message, "type": kind.type, "param": param, "code": kind.code}}


def _cut(text: str, limit: int) -> str:
    """Its beginning and its end, where the limits stand and what to do."""
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def describe(error: BaseException) -> tuple[ErrorKind, dict[str, Any]]:
    """Kind and body of any error; what was not raised on purpose keeps its details to itself."""
    for known, kind in TABLE:
        if isinstance(error, known):
            return kind, error_body(kind, str(error), getattr(error, "param", None))
    message = "the server failed on this request; its log says why"
    return _INTERNAL, error_body(_INTERNAL, message)


def error_response(error: BaseException) -> JSONResponse:
    """The answer to a request that failed."""
    kind, body = describe(error)
    headers: dict[str, str] = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    elif kind.status == 503:
        headers["Retry-After"] = str(RETRY_UNAVAILABLE)
    return JSONResponse(body, status_code=kind.status, headers=headers)


def status_response(
    status: int, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An answer to trouble with the request's form rather than its contents."""
    fallback = ErrorKind(status, "invalid_request_error" if status < 500 else "server_error", None)
    body = error_body(_BY_STATUS.get(status, fallback), message)
    return JSONResponse(body, status_code=status, headers=dict(headers or {}))


def install_handlers(app: FastAPI) -> None:
    """Answer every failure of `app` in this module's shape."""

    @app.exception_handler(PonderError)
    async def _ponder(request: Request, error: PonderError) -> JSONResponse:
        if describe(error)[0].status >= 500:
            # The pattern: a path may hold anything, line breaks among them.
            route = getattr(request.scope.get("route"), "path", "unknown")
            _LOG.error("%s %s: %s", request.method, route, error)
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(invalid_field(error.errors()[0]))

    @app.exception_handler(BodyTooLargeError)
    async def _too_large(request: Request, error: BodyTooLargeError) -> JSONResponse:
        return status_response(413, str(error))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        # Not `request.url`, which a strange Host header can keep from being parsed.
        where = f"{request.method} {request.scope['path']}"
        message = {
            404: f"there is no {where}; /docs lists what there is",
            405: f"{where} is not allowed; /docs lists what is",
        }.get(error.status_code, str(error.detail))
        return status_response(error.status_code, message, error.headers)

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        # The framework raises the error again after this answer, which logs it with its trace.
        return error_response(error)


def invalid_field(problem: Mapping[str, Any]) -> InvalidRequestError:
    """What pydantic found, in our words: the field as the caller spelt it, limit and value."""
    place = problem["loc"][1:] if problem["loc"][:1] in (("body",), ("path",)) else problem["loc"]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    param = param.removeprefix(".") or "body"
    if problem["type"] == "extra_forbidden":
        return InvalidRequestError(param, "unknown field; remove it, or see /docs for its spelling")
    if problem["type"] == "missing":
        return InvalidRequestError(param, "is missing; this field is required")
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return InvalidRequestError(param, "must be a JSON object")
    message = str(problem["msg"]).removeprefix("Value error, ")
    value = problem["input"]
    if isinstance(value, str | int | float | bool | None):
        message = f"{message}, not {_short(value)}"
    return InvalidRequestError(param, message)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
