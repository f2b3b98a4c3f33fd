"""Writing sessions to the store: what has changed, when it is due, and what if it fails.

Writes lag behind by a bounded delay and run in threads of their own; the engine's thread only
copies a session's state. What fails is tried again, and the session goes on meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from ponderttt.errors import ConflictError, PonderError, StoreError
from ponderttt.fast_weights.bank import AdapterState
from ponderttt.sessions.config import StoreConfig
from ponderttt.sessions.record import Facts, facts_of
from ponderttt.sessions.session import Session
from ponderttt.sessions.stats import Tally
from ponderttt.sessions.store import Commit, SessionStore
from ponderttt.sessions.workers import Workers

_LOG = logging.getLogger(__name__)

_MOST_BACKOFF = 30.0
#: Seconds between attempts where somebody waits for them.
_FLUSH_RETRY = 0.5
#: `last_used` is written where it has moved by so many seconds.
_USED_STEP = 60.0

_Mark = tuple[object, ...]


@dataclass(slots=True)
class _Tracked:
    """A session that is here: this server has its lock, or is about to take it.

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


class Writes:
    """The sessions that are here, and what the store has yet to hear of them.

    In the engine's thread only, but for `in` and `names`. Times are monotonic.

    Args:
        store: where they are written to.
        workers: do it.
        check: raises ConflictError unless this server still has a session's lock; called in the
            workers' threads.
        config: delays.
        copy_state: a session's tensors, copied.
        tally: what was written is counted there.
    """

    def __init__(
        self,
        store: SessionStore,
        workers: Workers,
        check: Callable[[str], None],
        config: StoreConfig,
        copy_state: Callable[[Session], AdapterState],
        tally: Tally,
    ) -> None:
        self._store = store
        self._workers = workers
        self._check = check
        self._config = config
        self._copy_state = copy_state
        self._tally = tally
        self._tracked: dict[str, _Tracked] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tracked

    def __len__(self) -> int:
        return len(self._tracked)

    def names(self) -> list[str]:
        """Ids of the sessions that are here; in any thread."""
        return list(self._tracked)

    @property
    def sessions(self) -> list[Session]:
        """The sessions that are here."""
        return [tracked.session for tracked in self._tracked.values()]

    # --- which sessions -------------------------------------------------------------------------

    def track(self, session: Session) -> None:
        """A session of which the store has yet to hear, all of it."""
        self._tracked[session.owner] = _Tracked(session, None, -1, dirty_since=time.monotonic())

    def track_stored(self, session: Session) -> None:
        """A session that the store has as it is at this moment."""
        self._tracked[session.owner] = _Tracked(session, self._mark(session), session.version)

    def untrack(self, name: str) -> None:
        """A session is here no more; nothing where it was not."""
        self._tracked.pop(name, None)

    def job(self, name: str) -> Future[Commit] | None:
        """A session's commit that is under way."""
        tracked = self._tracked.get(name)
        return tracked.job if tracked is not None else None

    def is_clean(self, session: Session) -> bool:
        """Whether the store has all of the session."""
        tracked = self._tracked[session.owner]
        return tracked.job is None and tracked.saved == self._mark(session)

    def is_lost(self, session: Session) -> bool:
        """Whether another server has taken the session."""
        return self._tracked[session.owner].lost

    def dirty_since(self) -> list[float]:
        """When the sessions with changes that are not committed yet were first seen to differ."""
        return [t.dirty_since for t in self._tracked.values() if t.dirty_since is not None]

    def hurry(self, name: str) -> Session:
        """What the session has yet to save is due now."""
        tracked = self._tracked[name]
        if tracked.dirty_since is not None:
            tracked.dirty_since = min(
                tracked.dirty_since, time.monotonic() - self._config.write_delay
            )
        return tracked.session

    # --- now and then ---------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Hand over what is due and hear what has become of the rest; returns at once."""
        for tracked in self._tracked.values():
            self._reap(tracked, now)
            self._look_at(tracked, now)
            since = tracked.dirty_since
            due = since is not None and now >= max(
                since + self._config.write_delay, tracked.retry_at
            )
            if due and tracked.job is None and not tracked.lost:
                self._hand_over(tracked, now)

    def next_due(self) -> float | None:
        """Seconds after which `tick` has something to do; None: nothing is known to be left."""
        if any(t.job is not None for t in self._tracked.values()):
            return 0.0
        now = time.monotonic()
        due = [
            max(t.dirty_since + self._config.write_delay, t.retry_at) - now
            for t in self._tracked.values()
            if t.dirty_since is not None and not t.lost
        ]
        return min(due, default=None)

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

    # --- at once --------------------------------------------------------------------------------

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

    # --- one commit -----------------------------------------------------------------------------

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
        return self._workers.submit(self._commit, facts, state, after)

    def _commit(
        self, facts: Facts, state: AdapterState | None, after: Future[Commit] | None
    ) -> Commit:
        """In a worker's thread."""
        if after is not None:
            after.exception()  # it was handed over before this, so it ends
        begun = time.perf_counter()
        # Again and again: a file may take longer than the lease lasts.
        commit = self._store.commit(facts, state, lambda: self._check(facts.id))
        seconds = time.perf_counter() - begun
        self._tally.count(commits=1, commit_seconds=seconds, commit_bytes=commit.nbytes)
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
        self._tally.count(failures=1)
        known = isinstance(error, PonderError | ValueError)
        _LOG.warning(
            "session %s is not saved (attempt %d, next in %.1f s): %s",
            tracked.session.owner, tracked.failures, wait, error,
            exc_info=None if known else error,
        )  # fmt: skip
