"""Sessions that nobody uses: leaving them to the store alone, and deleting them in the end."""

from __future__ import annotations

import time
from collections.abc import Callable

from ponderttt.fast_weights.bank import BASE_SLOT
from ponderttt.sessions.config import StoreConfig
from ponderttt.sessions.roster import Roster
from ponderttt.sessions.session import Session
from ponderttt.sessions.vault import Vault
from ponderttt.sessions.weights import SessionWeights

_TRIM_SECONDS = 0.5
_EXPIRE_SECONDS = 30.0


class Upkeep:
    """Looks now and then for idle sessions with a store. In the engine's thread only.

    Args:
        roster: which sessions there are.
        weights: where those are that are here.
        vault: the store.
        config: when a session is idle, and when it has expired.
        on_reset: called with a session whose weights became others without a new version.
    """

    def __init__(
        self,
        roster: Roster,
        weights: SessionWeights,
        vault: Vault,
        config: StoreConfig,
        on_reset: Callable[[Session], None],
    ) -> None:
        self._roster = roster
        self._weights = weights
        self._vault = vault
        self._config = config
        self._on_reset = on_reset
        self._next_trim = 0.0
        self._next_expiry = 0.0

    def tick(self) -> None:
        """Put away what is idle and delete what has expired, if it is time; returns at once."""
        now = time.monotonic()
        if now >= self._next_trim:
            self._next_trim = now + _TRIM_SECONDS
            self.trim()
        if now >= self._next_expiry:
            self._next_expiry = now + _EXPIRE_SECONDS
            self._expire()

    def next_due(self) -> float | None:
        """Seconds after which `tick` is to be called though nothing happens; None: never."""
        return None if self._config.ttl is None else _EXPIRE_SECONDS

    def trim(self) -> None:
        """Leave to the store alone: what is lost, what others want, and what is idle for long."""
        vault = self._vault
        here = [s for s in vault.writes.sessions if s.pins == 0]
        for session in [s for s in here if vault.writes.is_lost(s)]:
            self.put_away(session)
            self._on_reset(session)
        for session in vault.leaving():
            if session.pins == 0 and not session.cold and vault.writes.is_clean(session):
                self.put_away(session)
        idle = sorted(
            (s for s in here if not s.cold and vault.writes.is_clean(s)), key=lambda s: s.last_used
        )
        waiting = sum(s.slot == BASE_SLOT for s in vault.writes.sessions)
        long_ago = time.time() - self._config.idle_seconds
        for session in idle:
            surplus = session.slot == BASE_SLOT and waiting > self._config.ram_sessions
            if surplus or session.last_used < long_ago:
                waiting -= session.slot == BASE_SLOT
                self.put_away(session)

    def put_away(self, session: Session) -> None:
        """Leave a session to the store alone; what is not saved of it is lost."""
        self._weights.drop(session)
        session.cold = True
        self._vault.put_away(session)

    def _expire(self) -> None:
        if self._config.ttl is None:
            return
        limit = time.time() - self._config.ttl
        for session in self._roster:
            if session.pins == 0 and session.last_used < limit:
                self._weights.drop(session)
                self._roster.remove(session)
                self._on_reset(session)
                self._vault.delete(session.owner, limit)
