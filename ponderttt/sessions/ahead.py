"""What other threads do with the store, so that the engine's thread need not wait for it."""

from __future__ import annotations

from concurrent.futures import Future

from ponderttt.errors import ConflictError, NotFoundError
from ponderttt.sessions.names import given_or_new_name
from ponderttt.sessions.roster import Roster
from ponderttt.sessions.store import Listing, Loaded
from ponderttt.sessions.vault import Vault


class Ahead:
    """Prepares what a `SessionManager` is about to do.

    The manager does all of it by itself where it was not done before, but in the engine's thread,
    which then waits. From any thread; of what is asked of the store, only `fetch` returns at once.

    Args:
        roster: which sessions there are.
        vault: the store; None: there is none, and little to prepare.
    """

    def __init__(self, roster: Roster, vault: Vault | None) -> None:
        self._roster = roster
        self._vault = vault

    # --- for `create` and `fork` ----------------------------------------------------------------

    def reserve(self, name: str | None) -> str:
        """Find a name to be free in the store. End it with `cancel_reservation`.

        Returns:
            The name; None became one.
        Raises:
            InvalidRequestError: not a valid id.
            ConflictError: the id is taken.
            StoreError: the store fails.
        """
        name = given_or_new_name(name)
        if self._vault is not None and self._roster.find(name) is None:
            self._vault.reserve(name)
        return name

    def cancel_reservation(self, name: str) -> None:
        """Let go of a reserved name; nothing where it was used."""
        if self._vault is not None:
            self._vault.holds.cancel_reservation(name)

    # --- for `delete` ---------------------------------------------------------------------------

    def claim_to_delete(self, name: str) -> None:
        """Make sure that no other server uses a session. End it with `end_claim`.

        Raises:
            ConflictError: another server has it.
            StoreError: the store fails.
        """
        if self._vault is not None:
            self._vault.holds.claim_to_delete(name)

    def end_claim(self, name: str) -> None:
        """What was claimed has been deleted, or stays."""
        if self._vault is not None:
            self._vault.holds.end_claim(name)

    # --- for `warm` -----------------------------------------------------------------------------

    def is_cold(self, name: str) -> bool:
        """Whether the session would have to be fetched before it can be used."""
        if self._vault is None:
            return False
        session = self._roster.find(name)
        return session is None or session.cold

    def is_unknown(self, name: str) -> bool:
        """Whether the store may have a session that was not there before."""
        return self._vault is not None and not self._roster.is_known(name)

    def fetch(self, name: str) -> Future[Loaded]:
        """Read a cold session in a thread of the store's; does not wait.

        Raises:
            NotFoundError: there is no store to look into.
        """
        if self._vault is None:
            self._roster.get(name)
            raise NotFoundError("session", f"session {name!r} is not stored")
        return self._vault.fetches.fetch(name)

    def has_fetched(self, name: str, loaded: Loaded) -> bool:
        """Whether `warm` can take this in: nothing was deleted or used since."""
        return self._vault is not None and self._vault.fetches.has_fetched(name, loaded)

    # --- for `rollback` and `refresh` -----------------------------------------------------------

    def read_version(self, name: str, version: int) -> Loaded:
        """A kept version.

        Raises:
            ConflictError: there is no store.
            NotFoundError, DamagedSessionError, StoreError.
        """
        if self._vault is None:
            raise no_versions("roll back")
        return self._vault.read_version(name, version)

    def listing(self) -> Listing | None:
        """What the store has; None where there is none.

        Raises:
            StoreError: it can't be read.
        """
        return None if self._vault is None else self._vault.listing()

    # --- other servers of the store -------------------------------------------------------------

    def ask_for(self, name: str) -> None:
        """Ask the server that has a session to let go of it once it is idle."""
        if self._vault is None:
            raise RuntimeError("there is no store")
        self._vault.ask_for(name)

    def leave(self, name: str) -> None:
        """Leave a session to the store, once no request uses it."""
        if self._vault is not None:
            self._vault.leave(name)


def no_versions(doing: str) -> ConflictError:
    """The error of something that needs a store, where there is none."""
    return ConflictError(
        "session",
        f"can't {doing}: this server keeps sessions in memory, and no versions of them; "
        "start it with --sessions DIRECTORY, or fork the session in time",
    )
