"""Sessions that waiting requests need, on their way from the store while the engine goes on."""

from __future__ import annotations

from concurrent.futures import Future

from ponderttt.sessions.manager import SessionManager
from ponderttt.sessions.session import Session
from ponderttt.sessions.store import Loaded


class Arrivals:
    """Has cold sessions read in other threads, so that the engine's never waits for the store.

    Args:
        sessions: which ones there are.
    """

    def __init__(self, sessions: SessionManager) -> None:
        self._sessions = sessions
        self._coming: dict[str, Future[Loaded]] = {}

    def __bool__(self) -> bool:
        """Whether any is on its way."""
        return bool(self._coming)

    def is_awaited(self, session: Session | None, *, send_for: bool = True) -> bool:
        """Whether a session has yet to come; nobody waits for one that was deleted.

        Args:
            session: of a request; None: it needs none.
            send_for: begin to read it, if that has not begun.
        """
        if session is None or not session.cold or not self._sessions.has(session):
            return False
        coming = self._coming.get(session.owner)
        if coming is None and send_for:
            coming = self._coming[session.owner] = self._sessions.ahead.fetch(session.owner)
        return coming is None or not coming.done()

    def forget(self, session: Session | None) -> None:
        """A request that waited for it has gone; another one may ask again."""
        if session is not None:
            self._coming.pop(session.owner, None)

    def take_in(self, session: Session) -> bool:
        """Make a session that has come usable; False where it has to be read once more.

        Raises:
            NotFoundError, DamagedSessionError, ConflictError, StoreError: it can't be read.
        """
        coming = self._coming.pop(session.owner, None)
        if not session.cold:
            return True
        if coming is None or not coming.done():
            return False
        loaded = coming.result()
        # Others may have used it and put it away since.
        if not self._sessions.ahead.has_fetched(session.owner, loaded):
            return False
        self._sessions.warm(session.owner, loaded)
        return True
