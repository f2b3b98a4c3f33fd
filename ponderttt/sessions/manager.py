"""All sessions of an engine: creating, finding, using, forking, and deleting them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import ConflictError
from ponderttt.fast_weights.bank import BASE_SLOT, AdapterBank, AdapterState
from ponderttt.sessions.ahead import Ahead, no_versions
from ponderttt.sessions.config import StoreConfig
from ponderttt.sessions.locks import Locks, open_locks
from ponderttt.sessions.names import given_or_new_name, plain_name
from ponderttt.sessions.record import Facts, apply_facts, apply_learning
from ponderttt.sessions.roster import Roster
from ponderttt.sessions.session import Session
from ponderttt.sessions.stats import StoreStats
from ponderttt.sessions.store import Commit, Listing, Loaded, SessionStore
from ponderttt.sessions.upkeep import Upkeep
from ponderttt.sessions.vault import Vault
from ponderttt.sessions.weights import SessionWeights


@dataclass(frozen=True, slots=True)
class Attached:
    """What there is where sessions are kept in a store."""

    vault: Vault
    upkeep: Upkeep
    config: StoreConfig


class SessionManager:
    """All sessions of one engine. Call it in the engine's thread, but for what says otherwise.

    Sessions in use hold a slot of the bank; idle ones stay there until somebody else needs the
    slot, then wait in RAM (least recently used first). With a store, those that have waited longest
    are left to it, and fetched when they are needed again.

    Args:
        bank: of fast weights.
        max_sessions: sessions kept at most.
    """

    def __init__(self, bank: AdapterBank, max_sessions: int) -> None:
        self._roster = Roster(max_sessions)
        self._weights = SessionWeights(bank)
        self._attached: Attached | None = None
        self.evictions = 0
        #: What other threads may do before the engine's acts; `attach` replaces it.
        self.ahead = Ahead(self._roster, None)
        #: Called with a session whose weights became others without a new version.
        self.on_reset: Callable[[Session], None] = lambda session: None

    def attach(self, store: SessionStore, config: StoreConfig, locks: Locks | None = None) -> None:
        """Keep sessions in a store from now on, beginning with those that it has.

        Raises:
            StoreError: it can't be read.
        """
        locks = open_locks(store.files, config.lease_seconds) if locks is None else locks
        vault = Vault(store, locks, config, self.state)
        upkeep = Upkeep(
            self._roster, self._weights, vault, config, lambda session: self.on_reset(session)
        )
        self._attached = Attached(vault, upkeep, config)
        self.ahead = Ahead(self._roster, vault)
        listing = vault.listing()
        vault.finish_deletions(listing.deleted)
        self._roster.unreadable.update(listing.unreadable)
        for facts, kept in listing.readable:
            session = Session(facts.id, TTTParams(), ephemeral=False, state=None, cold=True)
            apply_facts(session, facts)
            session.kept = kept
            self._roster.add(session)

    # --- which there are ------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._roster)

    def names(self) -> list[str]:
        """Ids in the order of their creation."""
        return self._roster.names()

    def unreadable(self) -> dict[str, str]:
        """What is wrong with stored sessions that can't be used, by id."""
        return dict(self._roster.unreadable)

    def count(self, key_id: str | None) -> int:
        """Sessions of an API key, cold ones too; None: those of nobody in particular."""
        return self._roster.count(key_id)

    def get(self, name: str) -> Session:
        """The session with this id; from any thread.

        Raises:
            NotFoundError: unknown.
            DamagedSessionError: it is stored, but can't be read.
        """
        return self._roster.get(name)

    def has(self, session: Session) -> bool:
        """Whether this very session exists still; from any thread."""
        return self._roster.find(session.owner) is session

    # --- creating and deleting ------------------------------------------------------------------

    def create(self, name: str | None, defaults: TTTParams) -> Session:
        """A session that has learned nothing.

        Args:
            name: its id; None makes one.
            defaults: for requests of this session.
        Raises:
            InvalidRequestError: not a valid id.
            ConflictError: the id is taken.
            OverloadedError: no room for another session.
            StoreError: the store fails.
        """
        name = given_or_new_name(name)
        self._roster.check_new(name)
        return self._enter(Session(name, defaults, ephemeral=False, state=None))

    def create_ephemeral(self, request_id: str) -> Session:
        """Fast weights that live for one request."""
        return Session(f"request:{request_id}", TTTParams(), ephemeral=True, state=None)

    def fork(self, name: str, new_name: str | None) -> Session:
        """A copy of a session that goes its own way from here.

        Args:
            name: of the parent.
            new_name: of the copy; None makes one.
        Raises:
            As `create`, and as `warm` for the parent.
        """
        parent = self.get(name)
        new_name = given_or_new_name(new_name)
        self._roster.check_new(new_name)
        self.warm(name)
        return self._enter(parent.fork(new_name, self.state(parent)))

    def _enter(self, session: Session) -> Session:
        if self._attached is not None:
            self._attached.vault.track_new(session)
        self._roster.add(session)
        return session

    def delete(self, name: str) -> Future[None] | None:
        """Forget a session and its fast weights, and delete what is stored of it.

        Returns:
            Done when nothing is left in the store; None where there is no store.
        Raises:
            NotFoundError: unknown id.
            ConflictError: a request is using it, or another server.
            StoreError: the store fails.
        """
        session = None if name in self._roster.unreadable else self.get(name)
        if session is not None:
            _check_unused(session)
        vault = None if self._attached is None else self._attached.vault
        if vault is not None and not vault.has_claim(name):
            vault.holds.claim(name)
        self._roster.unreadable.pop(name, None)
        if session is not None:
            self._weights.drop(session)
            self._roster.remove(session)
        return None if vault is None else vault.delete(name)

    # --- using ----------------------------------------------------------------------------------

    def acquire(self, session: Session) -> bool:
        """Pin the session into the bank; False where every slot is pinned by others."""
        if session.slot == BASE_SLOT:
            if not self._weights.has_room and not self._evict():
                return False
            self._weights.enter(self._here(session))
        session.pins += 1
        session.last_used = time.time()
        return True

    def release(self, session: Session) -> None:
        """Unpin; weights that live for one request are wiped with the last pin."""
        session.pins -= 1
        session.last_used = time.time()
        if session.ephemeral and session.pins == 0:
            self._weights.drop(session)

    def _evict(self) -> bool:
        idle = [s for s in self._roster if s.slot != BASE_SLOT and s.pins == 0]
        if not idle:
            return False
        self._weights.evict(min(idle, key=lambda s: s.last_used))
        self.evictions += 1
        return True

    def state(self, session: Session) -> AdapterState:
        """A copy of the session's fast weights and optimiser state, wherever they are."""
        return self._weights.state(self._here(session))

    def digest(self, session: Session) -> str:
        """SHA-256 of the session's fast weights, in hexadecimal; taken once per version."""
        return self._weights.digest(self._here(session))

    def norm(self, session: Session) -> float:
        """L2 distance of the fast weights from fresh ones."""
        return self._weights.norm(self._here(session))

    def fresh_digest(self) -> str:
        """The digest of weights that have learned nothing: they are the base model's."""
        return self._weights.fresh_digest()

    def _here(self, session: Session) -> Session:
        """This very session, after its weights were fetched where they are not here."""
        if session.cold:
            self.warm(session.owner)
        return session

    def warm(self, name: str, loaded: Loaded | None = None) -> Session:
        """Take in a cold session; nothing where it is here already.

        Args:
            name: its id.
            loaded: what `Ahead.fetch` gave; None: fetch it now, and wait.
        Raises:
            NotFoundError, DamagedSessionError, ConflictError, StoreError.
            OverloadedError: another server has made it, and there is no room for it here.
        """
        session = self._roster.find(name)
        if self._attached is None or (session is not None and not session.cold):
            return self.get(name)
        vault = self._attached.vault
        if loaded is None or not vault.fetches.has_fetched(name, loaded):
            loaded = vault.fetches.fetch(name).result()
        if session is None:
            # Another server has made it, or it was unreadable until now.
            self._roster.check_room()
            session = Session(name, TTTParams(), ephemeral=False, state=None)
            self._roster.unreadable.pop(name, None)
            self._roster.add(session)
        self._become(session, loaded.facts, loaded.version, loaded.kept)
        session.state, session.cold = loaded.state, False
        # Whoever has it fetched is about to use it; it must not be the first to go again.
        session.last_used = time.time()
        vault.track_loaded(session, loaded)
        return session

    def _become(self, session: Session, facts: Facts, version: int, kept: tuple[int, ...]) -> None:
        """What was known of a session becomes what the store says."""
        if facts.created != session.created or version < session.version:
            # Another server has made it anew: its versions count from the beginning.
            self.on_reset(session)
        apply_facts(session, facts)
        session.version, session.kept, session.digested = version, kept, None

    # --- earlier versions -----------------------------------------------------------------------

    def snapshot(self, name: str) -> Future[Commit]:
        """Mark the current version to be kept beyond the last few; the oldest mark gives way.

        Returns:
            Done once the version is in the store; from then on it stays. It fails with a StoreError
            where the store does.
        Raises:
            ConflictError: there is no store.
        """
        session = self.get(name)
        if self._attached is None:
            raise no_versions("snapshot")
        limit = self._attached.config.keep_versions
        self.warm(name)
        if session.version not in session.pinned:
            session.pinned = [*session.pinned, session.version][-limit:]
        return self._attached.vault.writes.store_now(session)

    def rollback(self, name: str, version: int, loaded: Loaded | None = None) -> Session:
        """Go back to a kept version, as a new version.

        Weights, optimiser, learned chunks, threshold and averages become what they were; the
        ledger and the counts of chunks stay, since what was spent is spent.

        Args:
            name: of the session.
            version: to go back to.
            loaded: what `Ahead.read_version` gave for it; None: it is read now.
        Raises:
            NotFoundError: unknown session, or the version is not kept.
            ConflictError: a request is using it, or there is no store.
            DamagedSessionError: the version can't be read.
        """
        session = self.get(name)
        if self._attached is None:
            raise no_versions("roll back")
        self.warm(name)
        _check_unused(session)
        loaded = self._attached.vault.read_version(name, version) if loaded is None else loaded
        self._weights.drop(session)
        session.state = loaded.state
        apply_learning(session, loaded.facts)
        session.version += 1
        return session

    # --- other servers of the store -------------------------------------------------------------

    def refresh(self, listing: Listing | None) -> None:
        """Learn of sessions that other servers have made, changed and deleted.

        Args:
            listing: what `Ahead.listing` gave.
        """
        if self._attached is None or listing is None:
            return
        here = set(self.here())
        stored = {facts.id for facts, _ in listing.readable}
        for name in set(self.names()) - here - stored:
            self.forget_cold(name)
        for facts, kept in listing.readable:
            if facts.id in here or self._attached.vault.is_deleting(facts.id):
                continue
            session = self._roster.find(facts.id)
            if session is None:
                session = Session(facts.id, TTTParams(), ephemeral=False, state=None, cold=True)
                self._roster.add(session)
            self._become(session, facts, facts.version, kept)
        self._roster.unreadable = {
            name: why for name, why in listing.unreadable.items() if self._roster.find(name) is None
        }

    def here(self) -> list[str]:
        """Names of the sessions whose lock this server has, or is about to take."""
        return [] if self._attached is None else self._attached.vault.writes.names()

    def forget_cold(self, name: str) -> None:
        """A session is not stored any more; nothing where it is in use here."""
        session = self._roster.find(name)
        if session is not None and session.cold and not session.pins:
            self._roster.remove(session)

    # --- the store ------------------------------------------------------------------------------

    @property
    def store_url(self) -> str | None:
        """Where sessions are kept; None: in memory only."""
        return None if self._attached is None else self._attached.vault.url

    def store_stats(self) -> StoreStats | None:
        """What the store has done; None where there is none."""
        if self._attached is None:
            return None
        stats = self._attached.vault.stats()
        stats.unreadable = len(self._roster.unreadable)
        return stats

    def tick(self) -> None:
        """Store what is due, put away what is idle, delete what has expired; returns at once."""
        if self._attached is not None:
            self._attached.vault.tick()
            self._attached.upkeep.tick()

    def next_due(self) -> float | None:
        """Seconds after which `tick` is to be called again; None: nothing is left to do."""
        if self._attached is None:
            return None
        due = (self._attached.vault.next_due(), self._attached.upkeep.next_due())
        return min((each for each in due if each is not None), default=None)

    def flush(self, seconds: float = 60.0, only: list[str] | None = None) -> list[str]:
        """Store everything now; names of sessions for which that did not succeed in time."""
        return [] if self._attached is None else self._attached.vault.writes.flush(seconds, only)

    def close(self, seconds: float = 60.0) -> list[str]:
        """Store everything and let go of the store; names of what could not be stored."""
        if self._attached is None:
            return []
        left = self._attached.vault.writes.flush(seconds)
        self._attached.vault.close()
        return left


def _check_unused(session: Session) -> None:
    if session.pins:
        raise ConflictError(
            "session", f"session {plain_name(session.owner)!r} is in use by {session.pins} requests"
        )
