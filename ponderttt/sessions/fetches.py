"""Reading stored sessions in threads of their own, and keeping them until they are taken in."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

from ponderttt.errors import DamagedSessionError, NotFoundError, StoreError
from ponderttt.sessions.deletions import Deletions
from ponderttt.sessions.handover import Wishes
from ponderttt.sessions.holds import Holds
from ponderttt.sessions.stats import Tally
from ponderttt.sessions.store import Loaded, SessionStore, directory_of
from ponderttt.sessions.workers import Workers

_READERS = 4
#: Seconds after which what was fetched and not asked for again is let go.
_FETCH_SECONDS = 30.0

_DELETED_MEANWHILE = "session {!r} was deleted while it was read"


class Fetches:
    """Sessions that are being read, or were and are not used yet; thread-safe.

    Args:
        store: where they are.
        holds: their locks.
        deletions: sessions that are being deleted here are not read.
        wishes: where this server may have asked for them; None: it does not.
        tally: what was read is counted there.
    """

    def __init__(
        self,
        store: SessionStore,
        holds: Holds,
        deletions: Deletions,
        wishes: Wishes | None,
        tally: Tally,
    ) -> None:
        self._store = store
        self._holds = holds
        self._deletions = deletions
        self._wishes = wishes
        self._tally = tally
        self._readers = Workers(_READERS, "session-reader")
        # With when it began, and what tells it from another one of the same name.
        self._begun: dict[str, tuple[Future[Loaded], float, object]] = {}
        self._guard = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._begun

    def __len__(self) -> int:
        return len(self._begun)

    def fetch(self, name: str) -> Future[Loaded]:
        """Take a session's lock and read it, in another thread.

        Raises (in the future):
            NotFoundError, DamagedSessionError, ConflictError, StoreError.
        """
        with self._guard:
            found = self._begun.get(name)
            if found is not None:
                return found[0]
            ticket = object()
            future = self._readers.submit(self._fetch, name, ticket)
            self._begun[name] = future, time.monotonic(), ticket
        return future

    def has_fetched(self, name: str, loaded: Loaded) -> bool:
        """Whether this is what `fetch` gives now: nothing was deleted or used up since."""
        with self._guard:
            found = self._begun.get(name)
        if found is None or not found[0].done() or found[0].exception() is not None:
            return False
        return found[0].result() is loaded

    def forget(self, name: str) -> None:
        """What was fetched has been used, or must not be."""
        with self._guard:
            self._begun.pop(name, None)

    def drop_old(self, now: float) -> list[str]:
        """Forget what nobody has asked for in a while; `now` is monotonic.

        Returns:
            Names of these sessions, whose locks may be given back.
        """
        dropped = []
        for name, (future, since, _) in list(self._begun.items()):
            if future.done() and now - since > _FETCH_SECONDS:
                self.forget(name)
                dropped.append(name)
        return dropped

    def close(self) -> None:
        """End the threads once they have read what was asked for; does not wait."""
        self._readers.close()

    # --- in the readers' threads ----------------------------------------------------------------

    def _fetch(self, name: str, ticket: object) -> Loaded:
        begun = time.perf_counter()
        try:
            if name in self._deletions:
                raise NotFoundError("session", f"session {name!r} has been deleted")
            # One that another server has just made may be locked, and not stored yet.
            if not self._store.exists(name) and not self._holds.seen(name):
                self._store.peek(name)  # says so, before a lock is made
            self._holds.claim(name)
            if self._wishes is not None:
                self._wishes.fulfilled(directory_of(name))
            loaded = self._store.load(name)
            if not self._is_registered(name, ticket):
                raise NotFoundError("session", _DELETED_MEANWHILE.format(name))
        except BaseException as error:
            deleted = not self._is_registered(name, ticket)
            if not deleted:
                self.forget(name)
            self._holds.let_go(name)
            if isinstance(error, StoreError):
                self._tally.count(failures=1)
            if deleted and isinstance(error, DamagedSessionError):
                # What could not be read is not there any more.
                raise NotFoundError("session", _DELETED_MEANWHILE.format(name)) from error
            raise
        with self._guard:
            # It is kept for a while from now on, however long reading has taken.
            if (found := self._begun.get(name)) is not None and found[2] is ticket:
                self._begun[name] = found[0], time.monotonic(), ticket
        seconds = time.perf_counter() - begun
        self._tally.count(loads=1, load_seconds=seconds, recoveries=int(bool(loaded.damaged)))
        return loaded

    def _is_registered(self, name: str, ticket: object) -> bool:
        with self._guard:
            found = self._begun.get(name)
        return found is not None and found[2] is ticket
