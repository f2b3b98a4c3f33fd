"""Between sessions in use and the store: what to write when, and reading what was put away.

Writes lag behind by a bounded delay and run in threads of their own; the engine's thread only
copies a session's state. What fails is tried again, and the session goes on meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace

from ponderttt.errors import (
    ConflictError,
    DamagedSessionError,
    NotFoundError,
    PonderError,
    StoreError,
)
from ponderttt.fast_weights.bank import AdapterState
from ponderttt.sessions.config import StoreConfig
from ponderttt.sessions.deletions import Deletions
from ponderttt.sessions.handover import Wishes
from ponderttt.sessions.locks import FileLocks, Locks
from ponderttt.sessions.record import Facts, facts_of
from ponderttt.sessions.session import Session
from ponderttt.sessions.store import Commit, Listing, Loaded, SessionStore, directory_of
from ponderttt.sessions.workers import Workers

_LOG = logging.getLogger(__name__)

_WRITERS, _READERS = 4, 4
_TICK_SECONDS = 0.02
_MOST_BACKOFF = 30.0
#: Seconds between attempts where somebody waits for them.
_FLUSH_RETRY = 0.5
#: Seconds after which what was fetched and not asked for again is let go.
_FETCH_SECONDS = 30.0
#: `last_used` is written where it has moved by so many seconds.
_USED_STEP = 60.0

_DELETED_MEANWHILE = "session {!r} was deleted while it was read"


@dataclass(slots=True)
class StoreStats:
    """What the store has done so far, and what it has yet to do.

    Args:
        commits, commit_seconds, commit_bytes: that succeeded.
        failures: commits, loads and deletions that failed.
        loads, load_seconds: sessions read.
        recoveries: loads that found the newest version damaged and fell back to an older one.
        put_away: sessions whose weights were left to the store alone.
        unsaved: sessions with changes that are not committed yet.
        unsaved_seconds: age of the oldest of these changes.
        unreadable: sessions of which no version can be read.
    """

    commits: int = 0
    commit_seconds: float = 0.0
    commit_bytes: int = 0
    failures: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    recoveries: int = 0
    put_away: int = 0
    unsaved: int = 0
    unsaved_seconds: float = 0.0
    unreadable: int = 0


_Mark = tuple[object, ...]


@dataclass(slots=True)
class _Tracked:
    """A session that this server holds the lock of.

    Args:
        saved: what it looked like when it was last committed; None: never.
        stored_version: whose tensors the store has.
        dirty_since: monotonic time at which it was first seen to differ.
        job: the commit under way, of the session as `job_mark` describes it.
        retry_at, failures: after commits that failed.
        lost: another server has taken the session.
    """

    session: Session
    saved: _Mark | None
    stored_version: int
    dirty_since: float | None = None
    job: Future[Commit] | None = None
    job_mark: _Mark = ()
    job_began: float = 0.0
    retry_at: float = 0.0
    failures: int = 0
    lost: bool = False


class Vault:
    """The store as the session manager uses it.

    In the engine's thread only, but for what stands under *from any thread*.

    Args:
        store, locks: of one URL.
        config: delays.
        copy_state: a session's tensors, copied.
    """

    def __init__(
        self,
        store: SessionStore,
        locks: Locks,
        config: StoreConfig,
        copy_state: Callable[[Session], AdapterState],
    ) -> None:
        self._store = store
        self._locks = locks
        self._config = config
        self._copy_state = copy_state
        self._tracked: dict[str, _Tracked] = {}
        self._writers = Workers(_WRITERS, "session-writer")
        self._readers = Workers(_READERS, "session-reader")
        # With when it began, and what tells it from another one of the same name.
        self._fetches: dict[str, tuple[Future[Loaded], float, object]] = {}
        self._fetch_guard = threading.Lock()
        self._deletions = Deletions(store, self._writers, self.claim, self._release)
        self._claims: set[str] = set()  # names whose lock is wanted for a deletion
        self._reserved: dict[str, Future[None]] = {}  # names about to be used, once they are free
        self._lock_guard = threading.Lock()  # one lock is taken or given back at a time
        self._stats = StoreStats()
        self._stats_guard = threading.Lock()
        self._next_tick = 0.0
        self._closing = threading.Event()
        self._wishes = Wishes(store.files)
        self._leaving: set[str] = set()  # to be left to others once no request uses them
        if not isinstance(locks, FileLocks):
            self._repeat("session-leases", config.lease_seconds / 6, locks.renew)
        if config.hand_over_seconds is not None:
            self._repeat("session-wishes", config.hand_over_seconds, self._hear_wishes)

    @property
    def url(self) -> str:
        """Where the sessions are."""
        return self._store.files.url

    def listing(self) -> Listing:
        """All stored sessions; in any thread."""
        return self._store.listing()

    def stats(self) -> StoreStats:
        """Counts of this moment."""
        now = time.monotonic()
        since = [t.dirty_since for t in self._tracked.values() if t.dirty_since is not None]
        with self._stats_guard:
            return replace(
                self._stats,
                unsaved=len(since),
                unsaved_seconds=now - min(since) if since else 0.0,
            )

    # --- from any thread ------------------------------------------------------------------------

    def fetch(self, name: str) -> Future[Loaded]:
        """Take a session's lock and read it, in another thread.

        Raises (in the future):
            NotFoundError, DamagedSessionError, ConflictError, StoreError.
        """
        with self._fetch_guard:
            found = self._fetches.get(name)
            if found is not None:
                return found[0]
            ticket = object()
            future = self._readers.submit(self._fetch, name, ticket)
            self._fetches[name] = future, time.monotonic(), ticket
        return future

    def has_fetched(self, name: str, loaded: Loaded) -> bool:
        """Whether this is what `fetch` gives now: nothing was deleted or used up since."""
        with self._fetch_guard:
            found = self._fetches.get(name)
        if found is None or not found[0].done() or found[0].exception() is not None:
            return False
        return found[0].result() is loaded

    def _fetch(self, name: str, ticket: object) -> Loaded:
        begun = time.perf_counter()
        try:
            if name in self._deletions:
                raise NotFoundError("session", f"session {name!r} has been deleted")
            # One that another server has just made may be locked, and not stored yet.
            if not self._store.exists(name) and not self._locks.seen(directory_of(name)):
                self._store.peek(name)  # says so, before a lock is made
            self.claim(name)
            if self._config.hand_over_seconds is not None:
                self._wishes.fulfilled(directory_of(name))
            loaded = self._store.load(name)
            if not self._is_registered(name, ticket):
                raise NotFoundError("session", _DELETED_MEANWHILE.format(name))
        except BaseException as error:
            deleted = not self._is_registered(name, ticket)
            if not deleted:
                self.forget_fetch(name)
            self._let_go(name)
            if isinstance(error, StoreError):
                self._count(failures=1)
            if deleted and isinstance(error, DamagedSessionError):
                # What could not be read is not there any more.
                raise NotFoundError("session", _DELETED_MEANWHILE.format(name)) from error
            raise
        with self._fetch_guard:
            # It is kept for a while from now on, however long reading has taken.
            if (found := self._fetches.get(name)) is not None and found[2] is ticket:
                self._fetches[name] = found[0], time.monotonic(), ticket
        seconds = time.perf_counter() - begun
        self._count(loads=1, load_seconds=seconds, recoveries=int(bool(loaded.damaged)))
        return loaded

    def _is_registered(self, name: str, ticket: object) -> bool:
        with self._fetch_guard:
            found = self._fetches.get(name)
        return found is not None and found[2] is ticket

    def reserve(self, name: str) -> None:
        """Make sure that a name is free, and take its lock; waits for whoever is at it already.

        Raises:
            ConflictError: it is taken, here or on another server.
            StoreError: the store fails.
        """
        with self._lock_guard:
            found = self._reserved.get(name)
            if found is None:
                mine = self._reserved[name] = Future[None]()
        if found is not None:
            found.result()
            return
        try:
            self._check_free(name)
        except BaseException as error:
            self._reserved.pop(name, None)
            self._let_go(name)
            mine.set_exception(error)
            raise
        mine.set_result(None)

    def _check_free(self, name: str) -> None:
        if not self._deletions.is_over(name):
            raise ConflictError("id", f"session {name!r} is being deleted; retry in a moment")
        self.claim(name)
        if self._store.exists(name):
            raise ConflictError("id", f"session {name!r} exists already; choose another id")

    def claim_to_delete(self, name: str) -> None:
        """Take a session's lock so that `delete` need not wait for the store.

        Raises:
            ConflictError: another server has it.
            StoreError: the store fails.
        """
        self._claims.add(name)
        try:
            self.claim(name)
        except BaseException:
            self._claims.discard(name)
            raise

    def end_claim(self, name: str) -> None:
        """The deletion has begun, or comes to nothing."""
        self._claims.discard(name)
        self._let_go(name)

    def has_claim(self, name: str) -> bool:
        """Whether the session's lock is ours for as long as the engine's thread says."""
        return name in self._tracked or name in self._claims

    def claim(self, name: str) -> None:
        """Take a session's lock; ConflictError where another server has it."""
        with self._lock_guard:
            self._locks.hold(directory_of(name))

    def ask_for(self, name: str) -> None:
        """Ask the server that has a session to let go of it once it is idle there."""
        self._wishes.ask_for(directory_of(name))

    def leave(self, name: str) -> None:
        """Leave a session to the store, and to any server, once no request uses it."""
        self._leaving.add(name)

    def read_version(self, name: str, version: int) -> Loaded:
        """A kept version of a session."""
        return self._store.load(name, version)

    def cancel_reservation(self, name: str) -> None:
        """The name was not used after all; in any thread."""
        if self._reserved.pop(name, None) is not None:
            # Nothing is stored under it: refused requests must not leave a file each.
            self._let_go(name, forget=True)

    # --- sessions that are here -----------------------------------------------------------------

    def track_new(self, session: Session) -> None:
        """A session that was just created: it is to be stored."""
        self.reserve(session.owner)
        self._tracked[session.owner] = _Tracked(session, None, -1, dirty_since=time.monotonic())
        self._reserved.pop(session.owner, None)

    def track_loaded(self, session: Session, loaded: Loaded) -> None:
        """A session that was just made what `loaded` says."""
        if loaded.damaged:
            self.track_loaded_anew(session)
        else:
            tracked = _Tracked(session, self._mark(session), session.version)
            self._tracked[session.owner] = tracked
        self.forget_fetch(session.owner)

    def track_loaded_anew(self, session: Session) -> None:
        """The same, but the store has yet to hear of its new version."""
        self._tracked[session.owner] = _Tracked(session, None, -1, dirty_since=time.monotonic())

    def forget_fetch(self, name: str) -> None:
        """What was fetched has been used."""
        with self._fetch_guard:
            self._fetches.pop(name, None)

    def is_clean(self, session: Session) -> bool:
        """Whether the store has all of the session."""
        tracked = self._tracked[session.owner]
        return tracked.job is None and tracked.saved == self._mark(session)

    def put_away(self, session: Session) -> None:
        """Leave a session to the store and to whichever server asks next."""
        del self._tracked[session.owner]
        self._leaving.discard(session.owner)
        self._count(put_away=1)
        self._writers.submit(self._let_go, session.owner)

    def is_lost(self, session: Session) -> bool:
        """Whether another server has taken the session."""
        return self._tracked[session.owner].lost

    def leaving(self) -> list[Session]:
        """Sessions here that are to be left; what they have yet to save is due now."""
        self._leaving.intersection_update(set(self._tracked))
        found = [self._tracked[name] for name in self._leaving]
        for tracked in found:
            if tracked.dirty_since is not None:
                tracked.dirty_since = min(
                    tracked.dirty_since, time.monotonic() - self._config.write_delay
                )
        return [tracked.session for tracked in found]

    @property
    def tracked(self) -> list[Session]:
        """The sessions that are here."""
        return [tracked.session for tracked in self._tracked.values()]

    def is_deleting(self, name: str) -> bool:
        """Whether a session is being deleted here."""
        return name in self._deletions

    # --- writing --------------------------------------------------------------------------------

    def tick(self) -> None:
        """Hand over what is due and hear what has become of the rest; returns at once."""
        now = time.monotonic()
        if now < self._next_tick:
            return
        self._next_tick = now + _TICK_SECONDS
        for tracked in self._tracked.values():
            self._reap(tracked, now)
            self._look_at(tracked, now)
            since = tracked.dirty_since
            due = since is not None and now >= max(
                since + self._config.write_delay, tracked.retry_at
            )
            if due and tracked.job is None and not tracked.lost:
                self._hand_over(tracked, now)
        self._reap_deletions(now)
        self._drop_old_fetches(now)

    def _look_at(self, tracked: _Tracked, now: float) -> None:
        if tracked.dirty_since is None and tracked.saved != self._mark(tracked.session):
            tracked.dirty_since = now

    def _mark(self, session: Session) -> _Mark:
        """Changes whenever there is something new to store."""
        step = _USED_STEP if self._config.ttl is None else min(_USED_STEP, self._config.ttl / 4)
        return (
            session.version,
            session.chunks,
            session.rollbacks,
            tuple(session.pinned),
            int(session.last_used // step),
        )

    def store_now(self, session: Session) -> Future[Commit]:
        """Commit the session as it is at this moment, whatever comes after.

        Raises (in the future):
            ConflictError: another server has taken the session.
            StoreError: the store fails; it is tried again, but with what the session is by then.
        """
        tracked = self._tracked[session.owner]
        job = self._submit(tracked, time.monotonic(), after=tracked.job)
        tracked.job = job
        return job

    def _hand_over(self, tracked: _Tracked, now: float) -> None:
        try:
            tracked.job = self._submit(tracked, now)
        except Exception as error:  # such as no memory for the copy
            self._note_failure(tracked, error, now)

    def _submit(
        self, tracked: _Tracked, now: float, after: Future[Commit] | None = None
    ) -> Future[Commit]:
        session = tracked.session
        facts = facts_of(session, self._store.codec.model, self._store.codec.layout)
        has_tensors = tracked.stored_version == session.version
        state = None if has_tensors else self._copy_state(session)
        tracked.job_mark, tracked.job_began = self._mark(session), now
        return self._writers.submit(self._commit, facts, state, after)

    def _commit(
        self, facts: Facts, state: AdapterState | None, after: Future[Commit] | None
    ) -> Commit:
        if after is not None:
            after.exception()  # it was handed over before this, so it ends
        begun = time.perf_counter()
        key = directory_of(facts.id)
        # Again and again: a file may take longer than the lease lasts.
        commit = self._store.commit(facts, state, lambda: self._locks.check(key))
        seconds = time.perf_counter() - begun
        self._count(commits=1, commit_seconds=seconds, commit_bytes=commit.nbytes)
        return commit

    def _reap(self, tracked: _Tracked, now: float) -> None:
        job, session = tracked.job, tracked.session
        if job is None or not job.done():
            return
        tracked.job = None
        error = job.exception()
        if error is None:
            tracked.saved = tracked.job_mark
            tracked.stored_version = int(str(tracked.job_mark[0]))
            tracked.failures, tracked.retry_at = 0, 0.0
            session.kept = job.result().kept
            # What has come since the copy was made is as old as the copy at most.
            changed = tracked.saved != self._mark(session)
            tracked.dirty_since = tracked.job_began if changed else None
        elif isinstance(error, ConflictError):
            tracked.lost = True
            _LOG.error("session %s goes on elsewhere; what is not saved is lost: %s",
                       session.owner, error)  # fmt: skip
        else:
            self._note_failure(tracked, error, now)

    def _note_failure(self, tracked: _Tracked, error: BaseException, now: float) -> None:
        tracked.failures += 1
        if not isinstance(error, StoreError):
            # What is stored can't be built on: write the tensors, too.
            tracked.stored_version = -1
        wait = min(0.25 * 2**tracked.failures, _MOST_BACKOFF)
        tracked.retry_at = now + wait
        self._count(failures=1)
        known = isinstance(error, PonderError | ValueError)
        _LOG.warning(
            "session %s is not saved (attempt %d, next in %.1f s): %s",
            tracked.session.owner, tracked.failures, wait, error,
            exc_info=None if known else error,
        )  # fmt: skip

    def next_due(self) -> float | None:
        """Seconds after which `tick` has something to do; None: nothing is left."""
        if not self._tracked and not self._deletions and not self._fetches:
            return None
        if any(t.job is not None for t in self._tracked.values()):
            return _TICK_SECONDS
        now = time.monotonic()
        due = [
            max(t.dirty_since + self._config.write_delay, t.retry_at) - now
            for t in self._tracked.values()
            if t.dirty_since is not None and not t.lost
        ]
        return max(min([*due, 1.0]), _TICK_SECONDS)

    def flush(self, seconds: float, only: Iterable[str] | None = None) -> list[str]:
        """Store everything now, waiting at most so many seconds.

        Args:
            seconds: limit.
            only: names of sessions; None: all.
        Returns:
            Names of sessions that could not be stored.
        """
        names = set(self._tracked if only is None else only)
        deadline = time.monotonic() + seconds
        # Earlier failures don't count: the store may work again, and there is no later.
        retry_at: dict[str, float] = {}
        while True:
            now, left = time.monotonic(), []
            for name in names:
                tracked = self._tracked.get(name)
                if tracked is None or tracked.lost:
                    continue
                self._reap(tracked, now)
                self._look_at(tracked, now)
                if tracked.job is None and tracked.dirty_since is not None:
                    if now >= retry_at.get(name, 0.0):
                        self._hand_over(tracked, now)
                        retry_at[name] = now + _FLUSH_RETRY
                    left.append(name)
                elif tracked.job is not None:
                    left.append(name)
            if not left or now >= deadline:
                return left
            time.sleep(0.002)

    # --- deleting -------------------------------------------------------------------------------

    def delete(self, name: str, unused_since: float | None = None) -> Future[None]:
        """Delete a session for good, in another thread.

        Args:
            name: whose lock is held.
            unused_since: Unix time; a session that was used later stays.
        Returns:
            Done when nothing is left of it. It fails with a StoreError where the store does; the
            deletion is then tried again until it succeeds.
        """
        tracked = self._tracked.pop(name, None)
        self._leaving.discard(name)
        job = tracked.job if tracked is not None else None
        # What was read before must not bring it back.
        self.forget_fetch(name)
        return self._deletions.begin(name, job, unused_since)

    def finish_deletions(self, names: Iterable[str]) -> None:
        """Go on with deletions that were cut short."""
        for name in names:
            self._deletions.finish(name)

    def _reap_deletions(self, now: float) -> None:
        over, failed = self._deletions.reap(now)
        self._count(failures=failed)
        for name in over:
            # Somebody may have taken the lock to delete it once more.
            self._writers.submit(self._let_go, name, forget=True)

    # --- ends -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Give back all locks; call `flush` before."""
        self._closing.set()
        for each in (self._writers, self._readers):
            each.close()
        for key in self._locks.held():
            try:
                self._locks.release(key)
            except StoreError as error:
                _LOG.warning("the lock of session %s is not given back: %s", key, error)

    def _let_go(self, name: str, *, forget: bool = False) -> None:
        """Give a lock back unless somebody wants it."""
        with self._lock_guard:
            uses = (self._tracked, self._fetches, self._reserved, self._deletions, self._claims)
            if any(name in names for names in uses):
                return
            try:
                self._locks.release(directory_of(name), forget=forget)
            except StoreError as error:
                _LOG.warning("the lock of session %s is not given back: %s", name, error)

    def _release(self, name: str, forget: bool) -> None:
        """Give a lock back, whoever wants it."""
        with self._lock_guard:
            self._locks.release(directory_of(name), forget=forget)

    def _drop_old_fetches(self, now: float) -> None:
        for name, (future, since, _) in list(self._fetches.items()):
            if future.done() and now - since > _FETCH_SECONDS:
                self.forget_fetch(name)
                if name not in self._tracked:
                    self._writers.submit(self._let_go, name)

    def _hear_wishes(self) -> None:
        names = {directory_of(name): name for name in list(self._tracked)}
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

    def _count(self, **added: float) -> None:
        with self._stats_guard:
            for name, amount in added.items():
                setattr(self._stats, name, getattr(self._stats, name) + amount)
