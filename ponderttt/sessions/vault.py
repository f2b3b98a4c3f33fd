"""Between sessions in use and the store: who is here, who comes and goes, and under whose lock.

What to write when is in `writes.py`, reading what was put away in `fetches.py`, deleting in
`deletions.py`, and who may have a session in `holds.py`. The vault moves sessions between them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from ponderttt.errors import ConflictError, PonderError
from ponderttt.fast_weights.bank import AdapterState
from ponderttt.sessions.config import StoreConfig
from ponderttt.sessions.deletions import Deletions
from ponderttt.sessions.fetches import Fetches
from ponderttt.sessions.handover import Wishes
from ponderttt.sessions.holds import Holds
from ponderttt.sessions.locks import FileLocks, Locks
from ponderttt.sessions.session import Session
from ponderttt.sessions.stats import StoreStats, Tally
from ponderttt.sessions.store import Listing, Loaded, SessionStore, directory_of
from ponderttt.sessions.workers import Workers
from ponderttt.sessions.writes import Writes

_LOG = logging.getLogger(__name__)

_WRITERS = 4
_TICK_SECONDS = 0.02


class Vault:
    """The store as the session manager uses it.

    In the engine's thread only, but for what stands under *from any thread*.

    Args:
        store, locks: of one URL.
        config: delays.
        copy_state: a session's tensors, copied.
    Attributes:
        writes: the sessions that are here.
        fetches: those that were asked for; from any thread.
        holds: the locks of both; from any thread.
    """

    def __init__(
        self,
        store: SessionStore,
        locks: Locks,
        config: StoreConfig,
        copy_state: Callable[[Session], AdapterState],
    ) -> None:
        self._store = store
        self._writers = Workers(_WRITERS, "session-writer")
        self._tally = Tally()
        self._wishes = Wishes(store.files)
        self._leaving: set[str] = set()  # to be left to others once no request uses them
        self._next_tick = 0.0
        self._closing = threading.Event()
        hands_over = config.hand_over_seconds is not None
        self.holds = Holds(locks, self._is_used)
        self._deletions = Deletions(store, self._writers, self.holds.claim, self.holds.release)
        self.writes = Writes(
            store, self._writers, self.holds.check, config, copy_state, self._tally
        )
        self.fetches = Fetches(
            store, self.holds, self._deletions, self._wishes if hands_over else None, self._tally
        )
        if not isinstance(locks, FileLocks):
            self._repeat("session-leases", config.lease_seconds / 6, locks.renew)
        if config.hand_over_seconds is not None:
            self._repeat("session-wishes", config.hand_over_seconds, self._hear_wishes)

    @property
    def url(self) -> str:
        """Where the sessions are."""
        return self._store.files.url

    def stats(self) -> StoreStats:
        """Counts of this moment."""
        now, since = time.monotonic(), self.writes.dirty_since()
        return self._tally.stats(len(since), now - min(since) if since else 0.0)

    # --- from any thread ------------------------------------------------------------------------

    def listing(self) -> Listing:
        """All stored sessions."""
        return self._store.listing()

    def read_version(self, name: str, version: int) -> Loaded:
        """A kept version of a session."""
        return self._store.load(name, version)

    def reserve(self, name: str) -> None:
        """Make sure that a name is free, and take its lock; waits for whoever is at it already.

        Raises:
            ConflictError: it is taken, here or on another server.
            StoreError: the store fails.
        """
        self.holds.reserve(name, self._check_free)

    def ask_for(self, name: str) -> None:
        """Ask the server that has a session to let go of it once it is idle there."""
        self._wishes.ask_for(directory_of(name))

    def leave(self, name: str) -> None:
        """Leave a session to the store, and to any server, once no request uses it."""
        self._leaving.add(name)

    def has_claim(self, name: str) -> bool:
        """Whether the session's lock is ours for as long as the engine's thread says."""
        return name in self.writes or self.holds.is_claimed(name)

    def _check_free(self, name: str) -> None:
        if not self._deletions.is_over(name):
            raise ConflictError("id", f"session {name!r} is being deleted; retry in a moment")
        self.holds.claim(name)
        if self._store.exists(name):
            raise ConflictError("id", f"session {name!r} exists already; choose another id")

    def _is_used(self, name: str) -> bool:
        # In the order in which a session moves on, or it could be missed in each; whoever moves it
        # enters it first and removes it afterwards.
        return name in self.fetches or name in self.writes or name in self._deletions

    # --- sessions that are here -----------------------------------------------------------------

    def track_new(self, session: Session) -> None:
        """A session that was just created: it is to be stored."""
        # First: whoever reserved the name may cancel that at any moment, and let go of its lock.
        self.writes.track(session)
        try:
            self.reserve(session.owner)
        except BaseException:
            self.writes.untrack(session.owner)
            self.holds.let_go(session.owner)
            raise
        self.holds.fulfil_reservation(session.owner)

    def track_loaded(self, session: Session, loaded: Loaded) -> None:
        """A session that was just made what `loaded` says."""
        if loaded.damaged:
            # The store has yet to hear of its new version.
            self.writes.track(session)
        else:
            self.writes.track_stored(session)
        self.fetches.forget(session.owner)

    def put_away(self, session: Session) -> None:
        """Leave a session to the store and to whichever server asks next."""
        self.writes.untrack(session.owner)
        self._leaving.discard(session.owner)
        self._tally.count(put_away=1)
        self._writers.submit(self.holds.let_go, session.owner)

    def leaving(self) -> list[Session]:
        """Sessions here that are to be left; what they have yet to save is due now."""
        self._leaving.intersection_update(self.writes.names())
        # Other threads may have added names meanwhile, even of sessions that are not here.
        return [self.writes.hurry(name) for name in list(self._leaving) if name in self.writes]

    # --- now and then ---------------------------------------------------------------------------

    def tick(self) -> None:
        """Hand over what is due and hear what has become of the rest; returns at once."""
        now = time.monotonic()
        if now < self._next_tick:
            return
        self._next_tick = now + _TICK_SECONDS
        self.writes.tick(now)
        self._reap_deletions(now)
        for name in self.fetches.drop_old(now):
            if name not in self.writes:
                self._writers.submit(self.holds.let_go, name)

    def next_due(self) -> float | None:
        """Seconds after which `tick` has something to do; None: nothing is left."""
        if not self.writes and not self._deletions and not self.fetches:
            return None
        due = self.writes.next_due()
        return max(min(1.0 if due is None else due, 1.0), _TICK_SECONDS)

    # --- deleting -------------------------------------------------------------------------------

    def is_deleting(self, name: str) -> bool:
        """Whether a session is being deleted here."""
        return name in self._deletions

    def delete(self, name: str, unused_since: float | None = None) -> Future[None]:
        """Delete a session for good, in another thread.

        Args:
            name: its id. The other thread takes its lock where that is not here.
            unused_since: Unix time; a session that was used later stays.
        Returns:
            Done when nothing is left of it. It fails with a StoreError where the store does; the
            deletion is then tried again until it succeeds. It fails with a ConflictError where
            another server has the session, which then stays.
        """
        deleted = self._deletions.begin(name, self.writes.job(name), unused_since)
        # Only now: whoever gives back locks must not find that nobody wants this one.
        self.writes.untrack(name)
        self._leaving.discard(name)
        # What was read before must not bring it back.
        self.fetches.forget(name)
        return deleted

    def finish_deletions(self, names: Iterable[str]) -> None:
        """Go on with deletions that were cut short."""
        for name in names:
            self._deletions.finish(name)

    def _reap_deletions(self, now: float) -> None:
        over, failed = self._deletions.reap(now)
        self._tally.count(failures=failed)
        for name in over:
            # Somebody may have taken the lock to delete it once more.
            self._writers.submit(self.holds.let_go, name, forget=True)

    # --- threads --------------------------------------------------------------------------------

    def close(self) -> None:
        """Give back all locks; call `Writes.flush` before."""
        self._closing.set()
        self._writers.close()
        self.fetches.close()
        self.holds.release_all()

    def _hear_wishes(self) -> None:
        names = {directory_of(name): name for name in self.writes.names()}
        for key in self._wishes.among(names):
            self.leave(names[key])

    def _repeat(self, name: str, seconds: float, job: Callable[[], None]) -> None:
        """Do something with the store every few seconds, in a thread of its own, until the end."""

        def run() -> None:
            while not self._closing.wait(seconds):
                try:
                    job()
                except PonderError as error:
                    _LOG.warning("%s: %s", name, error)

        threading.Thread(target=run, name=name, daemon=True).start()
