"""Sessions as clients see them. Called in the engine's thread."""

from __future__ import annotations

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.core import EngineCore
from ponderttt.engine.resolve import ResolvedTTT, resolve_ttt
from ponderttt.errors import OverloadedError
from ponderttt.sessions.session import Session
from server.caller import Caller
from server.schemas.session import ChunkCosts, CreateSession, SessionObject


def session_defaults(core: EngineCore, wanted: CreateSession) -> TTTParams:
    """What a new session's requests do where they don't say otherwise.

    Raises:
        InvalidRequestError: fields that contradict each other or this server, as `ttt.<field>`.
    """
    defaults = wanted.params(wanted.id or "new")
    _in_force(core, defaults)
    return defaults


def check_quota(core: EngineCore, caller: Caller) -> None:
    """Raise OverloadedError where the caller has as many sessions as they may have."""
    limit = caller.max_sessions
    if limit is None:
        return
    mine = core.sessions.count(caller.key_id)
    if mine >= limit:
        raise OverloadedError(
            f"{mine} sessions of this key exist, and {limit} is the limit; delete one first",
            retry_after=60.0,
        )


def describe_session(
    core: EngineCore, session: Session, caller: Caller, *, in_list: bool = False
) -> SessionObject:
    """A session with its settings in force.

    Args:
        core: the engine.
        session: one of its sessions.
        caller: who asks, and has a name for it.
        in_list: leave out what has to be computed from the weights.
    """
    ttt = _in_force(core, session.defaults)
    return SessionObject.model_validate(
        {
            "id": caller.name_of(session),
            "owner": session.key_id,
            "created": int(session.created),
            "last_used": int(session.last_used),
            "version": session.version,
            "gate": ttt.gate,
            "action": ttt.action.name if ttt.gate == "fixed" else None,
            "budget": ttt.budget,
            "cost_model": ttt.cost_model,
            "chunk_size": ttt.chunk_size,
            "adapt_on": ttt.adapt_on,
            "when": ttt.when,
            "read": ttt.read,
            "chunks": session.chunks,
            "learned_tokens": session.learned_tokens,
            "chunks_by_action": session.ledger.chunks_by_action,
            "rollbacks": session.rollbacks,
            "cost": ChunkCosts(
                nominal=session.ledger.mean("nominal"),
                measured=session.ledger.mean("measured"),
                seconds=session.ledger.seconds,
            ),
            "kept_versions": list(session.kept),
            "snapshots": list(session.pinned),
            "norm": None if in_list else core.sessions.norm(session),
            "digest": None if in_list else core.sessions.digest(session),
        }
    )


def _in_force(core: EngineCore, defaults: TTTParams) -> ResolvedTTT:
    request = TTTParams(session="any")
    has_policy = core.policy is not None
    return resolve_ttt(request, defaults, core.config.ttt, core.default_gate, has_policy)
