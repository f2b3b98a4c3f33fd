"""Deleting stored sessions: in other threads, under their locks, until it has succeeded."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from ponderttt.errors import ConflictError, DamagedSessionError, NotFoundError
from ponderttt.sessions.store import Commit, SessionStore
from ponderttt.sessions.workers import Workers

_LOG = logging.getLogger(__name__)

# Seconds after the first attempt, and between later ones.
_FIRST_RETRY, _RETRY = 1.0, 5.0


@dataclass(frozen=True, slots=True)
class _Deletion:
    """One that has not been heard of yet: when to try it again if it fails, and how."""

    future: Future[None]
    retry_at: float
    delete: Callable[[], None]


class Deletions:
    """Sessions that are being deleted. In the engine's thread only, but for `in` and `is_over`.

    Args:
        store: what they are deleted from.
        workers: do it.
        hold: takes a session's lock; ConflictError where another server has it.
        let_go: gives the lock back, for good where the second argument says so.
    """

    def __init__(
        self,
        store: SessionStore,
        workers: Workers,
        hold: Callable[[str], None],
        let_go: Callable[[str, bool], None],
    ) -> None:
        self._store = store
        self._workers = workers
        self._hold = hold
        self._let_go = let_go
        self._begun: dict[str, _Deletion] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._begun

    def __len__(self) -> int:
        return len(self._begun)

    def is_over(self, name: str) -> bool:
        """Whether nothing is left of the session, or nobody is deleting it."""
        deletion = self._begun.get(name)
        if deletion is None:
            return True
        return deletion.future.done() and deletion.future.exception() is None

    def begin(
        self, name: str, job: Future[Commit] | None, unused_since: float | None
    ) -> Future[None]:
        """Delete a session.

        Args:
            name: its id.
            job: its commit that is under way; waited for.
            unused_since: Unix time; a session that another server has used later stays.
        """
        return self._begin(name, partial(self._delete, name, job, unused_since))

    def finish(self, name: str) -> None:
        """Go on with a deletion that was cut short."""
        self._begin(name, partial(self._finish, name))

    def reap(self, now: float) -> tuple[list[str], int]:
        """Hear what has become of them, and try again what has failed a while ago.

        Returns:
            Names that are dealt with, and how many attempts have failed.
        """
        over, failed = [], 0
        for name, deletion in list(self._begun.items()):
            if not deletion.future.done():
                continue
            error = deletion.future.exception()
            if error is None or isinstance(error, ConflictError | NotFoundError):
                del self._begun[name]
                over.append(name)
            elif now >= deletion.retry_at:
                _LOG.warning("session %s is not deleted yet: %s", name, error)
                failed += 1
                again = self._workers.submit(deletion.delete)
                self._begun[name] = _Deletion(again, now + _RETRY, deletion.delete)
        return over, failed

    def _begin(self, name: str, delete: Callable[[], None]) -> Future[None]:
        future = self._workers.submit(delete)
        self._begun[name] = _Deletion(future, time.monotonic() + _FIRST_RETRY, delete)
        return future

    # --- in the workers' threads ----------------------------------------------------------------

    def _delete(self, name: str, job: Future[Commit] | None, unused_since: float | None) -> None:
        if job is not None:
            job.exception()  # it was handed over before this, so it ends
        self._hold(name)
        stays = unused_since is not None and self._used_after(name, unused_since)
        if not stays:
            self._store.delete(name)
        self._let_go(name, not stays)

    def _finish(self, name: str) -> None:
        self._hold(name)
        # Another server may have finished it and made a session of this name since.
        if self._store.is_marked(name):
            self._store.delete(name)
        self._let_go(name, not self._store.exists(name))

    def _used_after(self, name: str, moment: float) -> bool:
        """Whether a stored session was used later, by another server."""
        try:
            return self._store.peek(name).last_used > moment
        except (NotFoundError, DamagedSessionError):
            return False
