"""Request bodies: limited in size, and JSON in the strict sense.

Python's parser takes NaN, infinities and half surrogate pairs; each of them would get as far as a
tokenizer or a tensor. Here they are refused at the door.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ponderttt.errors import InvalidRequestError
from server.errors import BodyTooLargeError, status_response

# Larger bodies are parsed outside the event loop.
_LARGE = 1 << 16
# Keys of one JSON object, wherever it stands: an unknown key costs an error each to report, and
# errors are made in the event loop. As many as a `logit_bias` may have.
_MAX_KEYS = 4096
# An escape that may be half a surrogate pair; strict UTF-8 lets none through unescaped.
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# What is read and thrown away of a body that is too large, so that a client that sends before it
# listens sees the answer rather than a broken connection.
_DRAIN_BYTES, _DRAIN_SECONDS = 1 << 26, 10.0


def parse_json(body: bytes) -> Any:
    """The value of a JSON text (RFC 8259).

    Raises:
        InvalidRequestError: not UTF-8, not JSON, NaN or infinity, too deep, half a surrogate pair,
            an object of too many keys, an integer of too many digits.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            "body", f"byte {error.start} is not valid UTF-8; send JSON in UTF-8"
        ) from error
    try:
        value = json.loads(
            text, parse_constant=_refuse_constant, object_pairs_hook=_object_of_few_keys
        )
    except json.JSONDecodeError as error:
        raise InvalidRequestError(
            "body", f"not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from error
    except RecursionError as error:
        raise InvalidRequestError("body", "the JSON is nested too deeply") from error
    except ValueError as error:
        if isinstance(error, InvalidRequestError):
            raise
        # The only other thing that Python refuses.
        digits = sys.get_int_max_str_digits()
        raise InvalidRequestError("body", f"an integer of more than {digits} digits") from error
    if _SURROGATE_ESCAPE.search(text):
        _refuse_surrogates(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequestError("body", f"{name} is not JSON; give finite numbers only")


def _object_of_few_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MAX_KEYS:
        raise InvalidRequestError(
            "body", f"holds an object of {len(pairs)} keys; at most {_MAX_KEYS} are taken"
        )
    return dict(pairs)


def _refuse_surrogates(value: Any) -> None:
    if not isinstance(value, dict):
        _refuse_surrogates_below("body", value)
        return
    for key, child in value.items():
        # First the key: it must be fit to be printed.
        _refuse_surrogate("body", key)
        _refuse_surrogates_below(key, child)


def _refuse_surrogates_below(field: str, value: Any) -> None:
    # No path is kept: a long key over many items would take their product in memory.
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            _refuse_surrogate(field, item)
        elif isinstance(item, dict):
            left += item.keys()
            left += item.values()
        elif isinstance(item, list):
            left += item


def _refuse_surrogate(field: str, text: str) -> None:
    if found := _SURROGATE.search(text):
        shown = text[max(0, found.start() - 20) : found.start() + 20]
        raise InvalidRequestError(
            field,
            f"character {found.start()} of {shown!a} is half a surrogate pair; send valid Unicode",
        )


class StrictRoute(APIRoute):
    """A route whose body is parsed by `parse_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, with the parsed body in its request."""
        handle = super().get_route_handler()
        takes_body = self.body_field is not None

        async def strict(request: Request) -> Response:
            if not takes_body:
                return await handle(request)
            body = await request.body()
            if body and not _is_json(request.headers.get("content-type", "")):
                return status_response(415, "send the header Content-Type: application/json")
            if len(body) > _LARGE:
                value = await asyncio.to_thread(parse_json, body)
            else:
                value = parse_json(body) if body else None
            # Where `Request.json` keeps its result.
            request._json = value
            return await handle(request)

        return strict


def _is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    # A type that a web page may send to any origin without asking is not taken for JSON, so that
    # no page can make its visitors' browsers talk to a server on their own machine.
    return media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )


class BodyLimit:
    """Middleware: answers 413 to bodies over a limit, without holding them in memory.

    Args:
        app: the application inside.
        max_bytes: of one body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared) > self._max_bytes:
            if "expect" not in headers:
                await _drain(receive)
            response = status_response(413, str(BodyTooLargeError(self._max_bytes)))
            await response(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._max_bytes:
                    if message.get("more_body"):
                        await _drain(receive)
                    raise BodyTooLargeError(self._max_bytes)
            return message

        return counted


async def _drain(receive: Receive) -> None:
    until, left = time.monotonic() + _DRAIN_SECONDS, _DRAIN_BYTES
    while left > 0 and (wait := until - time.monotonic()) > 0:
        try:
            message = await asyncio.wait_for(receive(), wait)
        except TimeoutError:
            return
        if message["type"] != "http.request" or not message.get("more_body"):
            return
        left -= len(message.get("body", b""))
