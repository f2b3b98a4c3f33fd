"""Sessions in memory: creating, finding, forking, deleting, and moving them through the bank."""

from __future__ import annotations

import copy
import time

import torch

from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import ConflictError, NotFoundError, OverloadedError
from ponderttt.fast_weights.bank import BASE_SLOT, AdapterBank, AdapterState
from ponderttt.sessions.names import check_session_id, new_session_id, plain_name
from ponderttt.sessions.session import Session


class SessionManager:
    """All sessions of one engine. Call it in the engine's thread only.

    Sessions in use hold a slot of the bank; idle ones stay there until somebody else needs the
    slot, then wait in RAM (least recently used first).

    Args:
        bank: of fast weights.
        max_sessions: sessions kept at most.
    """

    def __init__(self, bank: AdapterBank, max_sessions: int) -> None:
        self._bank = bank
        self._max_sessions = max_sessions
        self._sessions: dict[str, Session] = {}
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def names(self) -> list[str]:
        """Ids in the order of their creation."""
        return list(self._sessions)

    def create(self, name: str | None, defaults: TTTParams) -> Session:
        """A session that has learned nothing.

        Args:
            name: its id; None makes one.
            defaults: for requests of this session.
        Raises:
            InvalidRequestError: not a valid id.
            ConflictError: the id is taken.
            OverloadedError: no room for another session.
        """
        session = Session(self._new_name(name), defaults, ephemeral=False, state=None)
        self._sessions[session.owner] = session
        return session

    def create_ephemeral(self, request_id: str) -> Session:
        """Fast weights that live for one request."""
        return Session(f"request:{request_id}", TTTParams(), ephemeral=True, state=None)

    def _new_name(self, name: str | None) -> str:
        if name is None:
            name = new_session_id()
        check_session_id("id", name)
        if name in self._sessions:
            raise ConflictError(
                "id", f"session {plain_name(name)!r} exists already; choose another id"
            )
        if len(self._sessions) >= self._max_sessions:
            raise OverloadedError(
                f"{self._max_sessions} sessions exist, which is the limit; delete one first",
                retry_after=60.0,
            )
        return name

    def get(self, name: str) -> Session:
        """The session with this id, or NotFoundError."""
        session = self._sessions.get(name)
        if session is None:
            raise NotFoundError(
                "session",
                f"session {plain_name(name)!r} does not exist; create it with POST /v1/sessions",
            )
        return session

    def delete(self, name: str) -> None:
        """Forget a session and its fast weights.

        Raises:
            NotFoundError: unknown id.
            ConflictError: a request is using it.
        """
        session = self.get(name)
        if session.pins:
            raise ConflictError(
                "session", f"session {plain_name(name)!r} is in use by {session.pins} requests"
            )
        if session.slot != BASE_SLOT:
            self._bank.release(session.slot, session.owner)
        del self._sessions[name]

    def fork(self, name: str, new_name: str | None) -> Session:
        """A copy of a session that goes its own way from here."""
        parent = self.get(name)
        fresh_name = self._new_name(new_name)
        child = copy.copy(parent)
        child.owner = fresh_name
        child.state = self.state(parent)
        child.slot, child.pins = BASE_SLOT, 0
        child.ledger = copy.deepcopy(parent.ledger)
        child.threshold = copy.copy(parent.threshold)
        child.learned = parent.learned.copy()
        child.created = child.last_used = time.time()
        self._sessions[fresh_name] = child
        return child

    def state(self, session: Session) -> AdapterState:
        """A copy of the session's fast weights and optimiser state, wherever they are."""
        if session.slot != BASE_SLOT:
            return self._bank.state(session.slot, session.owner)
        return self._bank.fresh_state() if session.state is None else session.state.clone()

    def digest(self, session: Session) -> str:
        """SHA-256 of the session's fast weights, in hexadecimal."""
        return self.state(session).digest()

    def norm(self, session: Session) -> float:
        """L2 distance of the fast weights from fresh ones."""
        weights = self.state(session).weights
        return float((weights - self._bank.fresh_weights.to(weights.device)).norm())

    def acquire(self, session: Session) -> bool:
        """Pin the session into the bank; False where every slot is pinned by others."""
        if session.slot == BASE_SLOT:
            if not self._bank.has_room and not self._evict():
                return False
            state = self._bank.fresh_state() if session.state is None else session.state
            session.slot = self._bank.allocate(session.owner, state, session.version)
            session.state = None
        session.pins += 1
        session.last_used = time.time()
        return True

    def release(self, session: Session) -> None:
        """Unpin; weights that live for one request are wiped with the last pin."""
        session.pins -= 1
        session.last_used = time.time()
        if session.ephemeral and session.pins == 0:
            self._bank.release(session.slot, session.owner)
            session.slot = BASE_SLOT

    def _evict(self) -> bool:
        idle = [s for s in self._sessions.values() if s.slot != BASE_SLOT and s.pins == 0]
        if not idle:
            return False
        oldest = min(idle, key=lambda s: s.last_used)
        state = self._bank.release(oldest.slot, oldest.owner)
        oldest.state = state.to(torch.device("cpu"))
        oldest.slot = BASE_SLOT
        self.evictions += 1
        return True
