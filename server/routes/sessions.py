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
from ponderttt.fast_weights.peft_format import export_adapter
from server.caller import CallerDep
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
from server.session_objects import check_quota, describe_session, session_defaults

router = APIRouter(
    prefix="/v1/sessions", tags=["sessions"], route_class=StrictRoute, responses=ERRORS
)


@router.post("", status_code=201, response_model=SessionObject)
async def create_session(
    context: ContextDep, caller: CallerDep, body: Annotated[CreateSession | None, Body()] = None
) -> Response:
    """A session that has learned nothing yet."""
    wanted = body or CreateSession.model_validate({})

    def create(core: EngineCore, name: str) -> SessionObject:
        with own_field_names():
            defaults = session_defaults(core, wanted)
        check_quota(core, caller)
        return describe_session(core, core.sessions.create(name, defaults), caller)

    return json_response(
        await context.engine.new_session(caller.new_session(wanted.id), create), 201
    )


@router.get("")
async def list_sessions(context: ContextDep, caller: CallerDep) -> SessionList:
    """The caller's sessions (an administrator's: all), without `norm` and `digest`."""

    def describe_all(core: EngineCore) -> list[SessionObject]:
        names = filter(caller.sees, core.sessions.names())
        sessions = [core.sessions.get(name) for name in names]
        return [describe_session(core, session, caller, in_list=True) for session in sessions]

    return SessionList(data=await context.engine.call(describe_all))


@router.get("/{session_id}")
async def retrieve_session(
    session_id: str, context: ContextDep, caller: CallerDep
) -> SessionObject:
    """One session."""
    name = caller.session(session_id)
    await context.engine.warm(name)
    return await context.engine.call(
        lambda core: describe_session(core, core.sessions.get(name), caller)
    )


@router.delete("/{session_id}")
async def delete_session(session_id: str, context: ContextDep, caller: CallerDep) -> SessionDeleted:
    """Delete a session and all that is stored of it; 409 while a request uses it."""
    name = caller.session(session_id)
    await context.engine.delete_session(name)
    return SessionDeleted(id=session_id)


@router.post("/{session_id}/fork", status_code=201, response_model=SessionObject)
async def fork_session(
    session_id: str,
    context: ContextDep,
    caller: CallerDep,
    body: Annotated[ForkSession | None, Body()] = None,
) -> Response:
    """A copy that goes its own way from here; it belongs to the caller."""
    parent, engine = caller.session(session_id), context.engine
    new_name = caller.new_session(body.id if body is not None else None)
    await engine.warm(parent)

    def fork(core: EngineCore, name: str) -> SessionObject:
        core.sessions.get(parent)
        check_quota(core, caller)
        return describe_session(core, core.sessions.fork(parent, name), caller)

    return json_response(await engine.new_session(new_name, fork), 201)


@router.post("/{session_id}/snapshot")
async def snapshot_session(
    session_id: str, context: ContextDep, caller: CallerDep
) -> SessionObject:
    """Keep the current version beyond the last few, as long as no newer snapshots replace it."""
    engine, name = context.engine, caller.session(session_id)
    await engine.warm(name)
    # Answered once it is stored: a version that goes on learning would not be there later.
    await asyncio.wrap_future(await engine.call(lambda core: core.sessions.snapshot(name)))
    return await engine.call(lambda core: describe_session(core, core.sessions.get(name), caller))


@router.post("/{session_id}/rollback")
async def roll_back_session(
    session_id: str, body: RollbackSession, context: ContextDep, caller: CallerDep
) -> SessionObject:
    """Go back to a kept version, under a new number; the ledger stays as it is."""
    engine, name = context.engine, caller.session(session_id)
    await engine.warm(name)
    sessions = engine.core.sessions
    await engine.call(lambda core: core.sessions.get(name))
    loaded = await asyncio.to_thread(sessions.ahead.read_version, name, body.version)

    def roll_back(core: EngineCore) -> SessionObject:
        session = core.sessions.rollback(name, body.version, loaded)
        return describe_session(core, session, caller)

    return await engine.call(roll_back)


@router.get("/{session_id}/adapter", response_class=FileResponse)
async def download_adapter(session_id: str, context: ContextDep, caller: CallerDep) -> Response:
    """The fast weights as a PEFT adapter, zipped."""
    name = caller.session(session_id)
    await context.engine.warm(name)
    directory = tempfile.TemporaryDirectory(prefix="ponderttt-")
    try:
        files = Path(directory.name) / "adapter"
        weights = await context.engine.call(
            lambda core: core.sessions.state(core.sessions.get(name)).weights
        )
        core = context.engine.core
        # Files take their time; the engine does not wait for them.
        await asyncio.to_thread(export_adapter, core.bank.layout, weights, files, core.model_name)
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
