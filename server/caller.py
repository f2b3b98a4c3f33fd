"""Who makes a request, and which sessions they may name.

Sessions of different API keys never meet: in the engine each has a name that begins with its key's
id. A caller only ever names sessions within their own; what belongs to somebody else is not found,
as if it did not exist. Callers with the scope `admin` reach everybody's, by `<key id>~<name>`, and
those that no key made by `~<name>`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.request import Tenant
from ponderttt.errors import NotFoundError
from ponderttt.sessions.names import (
    KEY_SEPARATOR,
    check_plain_name,
    key_id_of,
    new_session_id,
    plain_name,
    qualified_name,
)
from ponderttt.sessions.session import Session
from server.keys import ApiKey, session_name
from server.request_log import RequestRecord
from server.schemas.ttt import TTTOptions
from server.settings import Settings


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes one request.

    Args:
        key: theirs; None where the server has no keys, and everybody is alike.
        settings: limits of those whose key has none of its own.
        record: what the log will say of the request.
    """

    key: ApiKey | None
    settings: Settings
    record: RequestRecord

    @property
    def key_id(self) -> str | None:
        """Of their key."""
        return self.key.id if self.key is not None else None

    @property
    def is_admin(self) -> bool:
        """Whether everybody's sessions are theirs to see."""
        return self.key is not None and self.key.may("admin")

    # --- sessions -------------------------------------------------------------------------------

    def session(self, name: str) -> str:
        """The engine's name for the session that the caller calls `name`.

        Raises:
            NotFoundError: no session of theirs can have this name.
        """
        self.record.session = name
        found = session_name(self.key, name)
        if found is None:
            raise NotFoundError(
                "session", f"session {name!r} does not exist; create it with POST /v1/sessions"
            )
        return found

    def params(self, options: TTTOptions | None) -> TTTParams | None:
        """What a completion asks of test-time training, in the engine's words.

        Raises:
            NotFoundError, InvalidRequestError: as `session` and `TTTOptions.params`.
        """
        if options is None:
            return None
        name = options.session
        return options.params(self.session(name) if name is not None else None)

    def new_session(self, name: str | None) -> str:
        """The engine's name for a session that the caller is about to make.

        Raises:
            InvalidRequestError: not a valid name.
        """
        if name is None:
            name = new_session_id()
        check_plain_name("id", name)
        self.record.session = name
        return qualified_name(self.key_id, name)

    def sees(self, qualified: str) -> bool:
        """Whether a session, by the engine's name, is theirs to see."""
        return self.is_admin or key_id_of(qualified) == self.key_id

    def name_of(self, session: Session) -> str:
        """What the caller calls a session that they may see."""
        if session.key_id == self.key_id:
            return plain_name(session.owner)
        return session.owner if session.key_id is not None else KEY_SEPARATOR + session.owner

    # --- limits ---------------------------------------------------------------------------------

    @property
    def max_sessions(self) -> int | None:
        """Sessions they may have; None: as many as the server takes."""
        if self.key is None:
            return None
        return _first(self.key.max_sessions, self.settings.sessions_per_key)

    @property
    def max_waiting(self) -> int:
        """Requests of theirs that may wait."""
        if self.key is None:
            return self.settings.max_waiting
        return min(
            _first(self.key.max_waiting, self.settings.waiting_per_key), self.settings.max_waiting
        )

    def tenant(self, session: str | None = None) -> Tenant:
        """Whom the engine takes them for: their key; where there are no keys, the session.

        Args:
            session: by the engine's name.
        """
        if self.key is None:
            return Tenant(session)
        return Tenant(self.key.id, self.max_waiting)


def _first(own: int | None, otherwise: int) -> int:
    return otherwise if own is None else own


def _caller(request: Request) -> Caller:
    state = request.scope["state"]
    return Caller(state["key"], request.app.state.context.settings, state["record"])


CallerDep = Annotated[Caller, Depends(_caller)]
