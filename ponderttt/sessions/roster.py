"""Which sessions an engine knows: by name, by API key, and how many more there may be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ponderttt.errors import (
    ConflictError,
    DamagedSessionError,
    NotFoundError,
    OverloadedError,
)
from ponderttt.sessions.names import plain_name
from ponderttt.sessions.session import Session


class Roster:
    """Sessions in the order of their creation, cold ones too.

    Looked into from any thread, changed in the engine's alone.

    Args:
        most: sessions kept at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._sessions: dict[str, Session] = {}
        self._by_key: Counter[str | None] = Counter()
        #: What is wrong with stored sessions that can't be used, by id.
        self.unreadable: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        """Over the sessions of this moment, which may be removed meanwhile."""
        return iter(list(self._sessions.values()))

    def names(self) -> list[str]:
        """Ids in the order of their creation."""
        return list(self._sessions)

    def find(self, name: str) -> Session | None:
        """The session with this id; None where it is unknown or can't be read."""
        return self._sessions.get(name)

    def get(self, name: str) -> Session:
        """The session with this id.

        Raises:
            NotFoundError: unknown.
            DamagedSessionError: it is stored, but can't be read.
        """
        session = self._sessions.get(name)
        if session is not None:
            return session
        if name in self.unreadable:
            raise DamagedSessionError(self.unreadable[name])
        raise NotFoundError(
            "session",
            f"session {plain_name(name)!r} does not exist; create it with POST /v1/sessions",
        )

    def is_known(self, name: str) -> bool:
        """Whether there is such a session, be it one that can't be read."""
        return name in self._sessions or name in self.unreadable

    def count(self, key_id: str | None) -> int:
        """Sessions of an API key; None: those of nobody in particular."""
        return self._by_key[key_id]

    def check_new(self, name: str) -> None:
        """Make sure that a session of this name may be added.

        Raises:
            ConflictError: the name is taken.
            OverloadedError: no room for another session.
        """
        if self.is_known(name):
            raise ConflictError(
                "id", f"session {plain_name(name)!r} exists already; choose another id"
            )
        self.check_room()

    def check_room(self) -> None:
        """Raise OverloadedError where there are as many sessions as there may be."""
        if len(self._sessions) >= self._most:
            raise OverloadedError(
                f"{self._most} sessions exist, which is the limit; delete one first",
                retry_after=60.0,
            )

    def add(self, session: Session) -> None:
        """Enter a session under its name."""
        self._sessions[session.owner] = session
        self._by_key[session.key_id] += 1

    def remove(self, session: Session) -> None:
        """Forget a session that was entered."""
        del self._sessions[session.owner]
        self._by_key[session.key_id] -= 1
