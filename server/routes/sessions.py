"""`/v1/sessions`: fast weights that outlive a request."""

from __future__ import annotations

import asyncio
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Body, Response
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from ponderttt.engine.core import EngineCore
from server.context import ContextDep
from server.routes.common import ERRORS, StrictRoute, json_response, own_field_names
from server.schemas.session import (
    CreateSession,
    ForkSession,
    RollbackSession,
    SessionDeleted,
    SessionList,
    SessionObject,
)
from server.session_objects import describe_session, session_defaults

router = APIRouter(
    prefix="/v1/sessions", tags=["sessions"], route_class=StrictRoute, responses=ERRORS
)


@router.post("", status_code=201, response_model=SessionObject)
async def create_session(
    context: ContextDep, body: Annotated[CreateSession | None, Body()] = None
) -> Response:
    """A session that has learned nothing yet."""
    wanted = body or CreateSession.model_validate({})

    def create(core: EngineCore, session_id: str) -> SessionObject:
        with own_field_names():
            defaults = session_defaults(core, wanted)
        return describe_session(core, core.sessions.create(session_id, defaults))

    return json_response(await context.engine.new_session(wanted.id, create), 201)


@router.get("")
async def list_sessions(context: ContextDep) -> SessionList:
    """All sessions, without `norm` and `digest`."""

    def describe_all(core: EngineCore) -> list[SessionObject]:
        sessions = [core.sessions.get(name) for name in core.sessions.names()]
        return [describe_session(core, session, in_list=True) for session in sessions]

    return SessionList(data=await context.engine.call(describe_all))


@router.get("/{session_id}")
async def retrieve_session(session_id: str, context: ContextDep) -> SessionObject:
    """One session."""
    await context.engine.warm(session_id)
    return await context.engine.call(
        lambda core: describe_session(core, core.sessions.get(session_id))
    )


@router.delete("/{session_id}")
async def delete_session(session_id: str, context: ContextDep) -> SessionDeleted:
    """Delete a session and all that is stored of it; 409 while a request uses it."""
    await context.engine.find(session_id)
    deleted = await context.engine.call(lambda core: core.delete_session(session_id))
    if deleted is not None:
        await asyncio.shield(asyncio.wrap_future(deleted))
    return SessionDeleted(id=session_id)


@router.post("/{session_id}/fork", status_code=201, response_model=SessionObject)
async def fork_session(
    session_id: str, context: ContextDep, body: Annotated[ForkSession | None, Body()] = None
) -> Response:
    """A copy that goes its own way from here."""
    new_id = body.id if body is not None else None
    engine = context.engine
    await engine.warm(session_id)

    def fork(core: EngineCore, name: str) -> SessionObject:
        return describe_session(core, core.sessions.fork(session_id, name))

    return json_response(await engine.new_session(new_id, fork), 201)


@router.post("/{session_id}/snapshot")
async def snapshot_session(session_id: str, context: ContextDep) -> SessionObject:
    """Keep the current version beyond the last few, as long as no newer snapshots replace it."""
    await context.engine.warm(session_id)
    return await context.engine.call(
        lambda core: describe_session(core, core.sessions.snapshot(session_id))
    )


@router.post("/{session_id}/rollback")
async def roll_back_session(
    session_id: str, body: RollbackSession, context: ContextDep
) -> SessionObject:
    """Go back to a kept version, under a new number; the ledger stays as it is."""
    engine = context.engine
    await engine.warm(session_id)
    sessions = engine.core.sessions
    await engine.call(lambda core: core.sessions.get(session_id))
    loaded = await asyncio.to_thread(sessions.read_version, session_id, body.version)

    def roll_back(core: EngineCore) -> SessionObject:
        session = core.sessions.rollback(session_id, body.version, loaded)
        return describe_session(core, session)

    return await engine.call(roll_back)


@router.get("/{session_id}/adapter", response_class=FileResponse)
async def download_adapter(session_id: str, context: ContextDep) -> Response:
    """The fast weights as a PEFT adapter, zipped."""
    await context.engine.warm(session_id)
    directory = tempfile.TemporaryDirectory(prefix="ponderttt-")
    try:
        files = Path(directory.name) / "adapter"
        await context.engine.call(lambda core: core.export_adapter(session_id, files))
        archive = Path(directory.name) / "adapter.zip"
        await asyncio.to_thread(_zip, files, archive)
    except BaseException:
        directory.cleanup()
        raise
    return FileResponse(
        archive,
        media_type="application/zip",
        filename=f"{session_id}.zip",
        background=BackgroundTask(directory.cleanup),
    )


def _zip(directory: Path, archive: Path) -> None:
    # Random-looking weights don't compress.
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for path in sorted(directory.rglob("*")):
            file.write(path, path.relative_to(directory))
