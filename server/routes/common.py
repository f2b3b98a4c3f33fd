"""What several groups of endpoints share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from ponderttt.errors import InvalidRequestError, NotFoundError
from server.body import StrictRoute
from server.collect import collect
from server.context import Context
from server.disconnect import ClientGoneError, while_connected
from server.events import Events
from server.replies import Reply
from server.schemas.base import ResponseModel
from server.sse import EventResponse
from server.stream import stream_reply

__all__ = [
    "ERRORS", "StrictRoute", "answer", "event_response", "json_response", "own_field_names",
    "session_in_ttt", "streamed",
]  # fmt: skip


class ErrorDetail(BaseModel):
    """What went wrong and what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """OpenAI's shape of an error."""

    error: ErrorDetail


#: For the documentation; it also replaces FastAPI's own form of validation errors.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "Something to change in the request."},
    "5XX": {"model": ErrorResponse, "description": "The server can't answer now."},
}


def streamed(model: type[ResponseModel]) -> dict[int | str, dict[str, Any]]:
    """Documentation of an answer that comes as JSON or as a stream."""
    stream = {"text/event-stream": {"schema": {"type": "string"}}}
    return {200: {"model": model, "content": stream, "description": "JSON, or events."}}


def json_response(model: ResponseModel, status_code: int = 200) -> Response:
    """A model as an answer."""
    return Response(model.model_dump_json(), status_code, media_type="application/json")


async def answer(
    request: Request,
    reply: Reply,
    context: Context,
    events: Events,
    prompts: int,
    n: int,
    *,
    stream: bool,
    usage: bool,
) -> Response:
    """Answer a completion call, in one piece or as a stream.

    Args:
        request: whose disconnect aborts the call.
        reply: the form of the answer.
        context: the server.
        events: of all its prompts.
        prompts, n: number of requests, and of sequences in each.
        stream: send pieces as they come.
        usage: end a stream with the number of tokens.
    """
    if stream:
        return await event_response(
            request, context, events, stream_reply(reply, events, prompts, n, usage)
        )
    try:
        outcome = await while_connected(request, collect(events, prompts, n))
    except ClientGoneError:
        return Response(status_code=499)
    finally:
        # Where the work was cancelled before it began.
        await events.aclose()
    # Spelling thousands of tokens takes a while.
    return await asyncio.to_thread(lambda: json_response(reply.whole(outcome)))


async def event_response(
    request: Request,
    context: Context,
    events: Events,
    objects: AsyncGenerator[dict[str, Any], None],
) -> Response:
    """Answer with a stream of `objects`, which consumes `events`, once there is something to say.

    What is refused while it waits gets its status that way, which clients know how to handle.
    """
    try:
        await while_connected(request, events.begin())
    except BaseException as error:
        await objects.aclose()
        await events.aclose()
        if isinstance(error, ClientGoneError):
            return Response(status_code=499)
        raise
    record = request.scope["state"]["record"]
    return EventResponse(objects, events, context.settings.stalled_reader_seconds, record)


@contextmanager
def session_in_ttt() -> Iterator[None]:
    """The `session` that the engine does not find is `ttt.session` in a completion."""
    try:
        yield
    except NotFoundError as error:
        if error.param != "session":
            raise
        raise NotFoundError("ttt.session", str(error)) from error


@contextmanager
def own_field_names() -> Iterator[None]:
    """What is `ttt.budget` in a completion is `budget` here."""
    try:
        yield
    except InvalidRequestError as error:
        message = str(error).removeprefix(f"{error.param}: ")
        raise InvalidRequestError(error.param.removeprefix("ttt."), message) from error
