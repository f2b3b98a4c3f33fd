"""`POST /v1/sessions/{id}/adapt`: teach a session some documents."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from ponderttt.engine.request import AdaptRequest
from ponderttt.errors import InvalidRequestError
from ponderttt.models.tokenizer import Tokenizer
from server.adaptation import Lesson, stream_lesson, teach
from server.caller import CallerDep
from server.context import ContextDep
from server.disconnect import ClientGoneError, while_connected
from server.routes.common import (
    ERRORS,
    StrictRoute,
    event_response,
    json_response,
    own_field_names,
    streamed,
)
from server.schemas.session import AdaptBody, AdaptReport, Document

router = APIRouter(tags=["sessions"], route_class=StrictRoute, responses=ERRORS)


@router.post("/v1/sessions/{session_id}/adapt", responses=streamed(AdaptReport))
async def adapt(
    session_id: str, body: AdaptBody, request: Request, context: ContextDep, caller: CallerDep
) -> Response:
    """Teach a session documents of any length, chunk by chunk."""
    engine, name = context.engine, caller.session(session_id)
    # Before the work of encoding: is there anybody to teach?
    await engine.warm(name)
    await engine.call(lambda core: core.sessions.get(name))
    with own_field_names():
        ttt = body.params(name)
    documents = await asyncio.to_thread(_encode, engine.core.tokenizer, body.documents)
    with own_field_names():
        asked = AdaptRequest(tuple(documents), ttt, tenant=caller.tenant(name))
        events = await context.submit([asked], caller.record)
    lesson = Lesson(
        [document.path for document in body.documents],
        [len(document) for document in documents],
    )
    if body.stream:
        return await event_response(request, context, events, stream_lesson(lesson, events))
    try:
        report = await while_connected(request, teach(lesson, events))
    except ClientGoneError:
        return Response(status_code=499)
    finally:
        await events.aclose()
    return json_response(report)


def _encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[tuple[int, ...]]:
    encoded = [tuple(tokenizer.encode(document.text)) for document in documents]
    for index, ids in enumerate(encoded):
        if not ids:
            raise InvalidRequestError(f"documents[{index}].text", "holds no token")
    return encoded
