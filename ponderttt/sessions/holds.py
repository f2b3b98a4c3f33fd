"""The locks of this server's sessions: taking them, and giving back those that nobody wants."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future

from ponderttt.errors import StoreError
from ponderttt.sessions.locks import Locks
from ponderttt.sessions.store import directory_of

_LOG = logging.getLogger(__name__)


class Holds:
    """Sessions whose lock this server has, or is about to take; thread-safe.

    Args:
        locks: of the store.
        is_used: whether a session is wanted here for what this class does not know of. Called in
            any thread, while no lock can be taken or given back. What a reservation or a claim
            turns into must be there before that is ended.
    """

    def __init__(self, locks: Locks, is_used: Callable[[str], bool]) -> None:
        self._locks = locks
        self._is_used = is_used
        self._claims = Counter[str]()  # how many deletions want a name's lock
        self._reserved: dict[str, Future[None]] = {}  # names about to be used, once they are free
        self._guard = threading.Lock()  # one lock is taken or given back at a time

    # --- taking ---------------------------------------------------------------------------------

    def claim(self, name: str) -> None:
        """Take a session's lock; nothing where it is here.

        Raises:
            ConflictError: another server has it.
            StoreError: the store fails.
        """
        with self._guard:
            self._locks.hold(directory_of(name))

    def check(self, name: str) -> None:
        """Make sure that the lock is still ours; ConflictError where it is not."""
        self._locks.check(directory_of(name))

    def seen(self, name: str) -> bool:
        """Whether some server has, or had, the lock; see `Locks.seen`."""
        return self._locks.seen(directory_of(name))

    def claim_to_delete(self, name: str) -> None:
        """Take a session's lock so that its deletion need not wait for the store.

        Raises:
            ConflictError: another server has it.
            StoreError: the store fails.
        """
        with self._guard:
            self._locks.hold(directory_of(name))
            self._claims[name] += 1

    def end_claim(self, name: str) -> None:
        """The deletion has begun, or comes to nothing."""
        with self._guard:
            self._claims -= Counter((name,))  # without those that are none any more
        self.let_go(name)

    def is_claimed(self, name: str) -> bool:
        """Whether `claim_to_delete` was called more often than `end_claim`."""
        return name in self._claims

    # --- names about to be used -----------------------------------------------------------------

    def reserve(self, name: str, check_free: Callable[[str], None]) -> None:
        """Keep a name for a session that is about to be made.

        Waits for whoever is reserving the name already; then it is kept, or refused, for both.

        Args:
            name: of the session.
            check_free: takes the lock, and raises where the name is not free.
        Raises:
            ConflictError, StoreError: as `check_free` does, ours or the other's.
        """
        with self._guard:
            found = self._reserved.get(name)
            if found is None:
                mine = self._reserved[name] = Future[None]()
        if found is not None:
            found.result()
            return
        try:
            check_free(name)
        except BaseException as error:
            self._reserved.pop(name, None)
            self.let_go(name)
            mine.set_exception(error)
            raise
        mine.set_result(None)

    def fulfil_reservation(self, name: str) -> None:
        """The name is used now."""
        self._reserved.pop(name, None)

    def cancel_reservation(self, name: str) -> None:
        """The name was not used after all; nothing where it was."""
        if self._reserved.pop(name, None) is not None:
            # Nothing is stored under it: refused requests must not leave a file each.
            self.let_go(name, forget=True)

    # --- giving back ----------------------------------------------------------------------------

    def let_go(self, name: str, *, forget: bool = False) -> None:
        """Give a lock back unless somebody wants it; `forget` where the session is no more."""
        with self._guard:
            # First what a session comes from, then what it becomes: it may move in between.
            if name in self._reserved or name in self._claims or self._is_used(name):
                return
            try:
                self._locks.release(directory_of(name), forget=forget)
            except StoreError as error:
                _LOG.warning("the lock of session %s is not given back: %s", name, error)

    def release(self, name: str, forget: bool) -> None:
        """Give a lock back, whoever wants it; StoreError where the store fails."""
        with self._guard:
            self._locks.release(directory_of(name), forget=forget)

    def release_all(self) -> None:
        """Give all locks back, at the end."""
        for key in self._locks.held():
            try:
                self._locks.release(key)
            except StoreError as error:
                _LOG.warning("the lock of session %s is not given back: %s", key, error)
