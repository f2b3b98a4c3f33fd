"""All sessions of an engine: creating, finding, forking, deleting, and moving their weights."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future

import torch

from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import (
    ConflictError,
    DamagedSessionError,
    NotFoundError,
    OverloadedError,
)
from ponderttt.fast_weights.bank import BASE_SLOT, AdapterBank, AdapterState
from ponderttt.sessions.config import StoreConfig
from ponderttt.sessions.locks import Locks, open_locks
from ponderttt.sessions.names import check_session_id, new_session_id, plain_name
from ponderttt.sessions.record import Facts, apply_facts, apply_learning
from ponderttt.sessions.session import Session
from ponderttt.sessions.store import Commit, Listing, Loaded, SessionStore
from ponderttt.sessions.vault import StoreStats, Vault

_TRIM_SECONDS = 0.5
_EXPIRE_SECONDS = 30.0


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
        self._bank = bank
        self._max_sessions = max_sessions
        self._sessions: dict[str, Session] = {}
        self._unreadable: dict[str, str] = {}
        self._by_key: Counter[str | None] = Counter()
        self._vault: Vault | None = None
        self._config: StoreConfig | None = None
        self._next_trim = 0.0
        self._next_expiry = 0.0
        self.evictions = 0
        #: Called with a session whose weights became others without a new version.
        self.on_reset: Callable[[Session], None] = lambda session: None

    def attach(self, store: SessionStore, config: StoreConfig, locks: Locks | None = None) -> None:
        """Keep sessions in a store from now on, beginning with those that it has.

        Raises:
            StoreError: it can't be read.
        """
        locks = open_locks(store.files, config.lease_seconds) if locks is None else locks
        self._vault = Vault(store, locks, config, self.state)
        self._config = config
        listing = self._vault.listing()
        self._vault.finish_deletions(listing.deleted)
        self._unreadable.update(listing.unreadable)
        for facts, kept in listing.readable:
            session = Session(facts.id, TTTParams(), ephemeral=False, state=None, cold=True)
            apply_facts(session, facts)
            session.kept = kept
            self._add(session)

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def store_url(self) -> str | None:
        """Where sessions are kept; None: in memory only."""
        return None if self._vault is None else self._vault.url

    def names(self) -> list[str]:
        """Ids in the order of their creation."""
        return list(self._sessions)

    def unreadable(self) -> dict[str, str]:
        """What is wrong with stored sessions that can't be used, by id."""
        return dict(self._unreadable)

    def count(self, key_id: str | None) -> int:
        """Sessions of an API key, cold ones too; None: those of nobody in particular."""
        return self._by_key[key_id]

    def store_stats(self) -> StoreStats | None:
        """What the store has done; None where there is none."""
        if self._vault is None:
            return None
        stats = self._vault.stats()
        stats.unreadable = len(self._unreadable)
        return stats

    # --- creating and finding -------------------------------------------------------------------

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
        session = Session(self._new_name(name), defaults, ephemeral=False, state=None)
        if self._vault is not None:
            self._vault.track_new(session)
        self._add(session)
        return session

    def create_ephemeral(self, request_id: str) -> Session:
        """Fast weights that live for one request."""
        return Session(f"request:{request_id}", TTTParams(), ephemeral=True, state=None)

    def reserve(self, name: str | None) -> str:
        """Find a name for `create` or `fork` to be free in the store; for any thread but theirs.

        They do it by themselves, but then the engine's thread waits for the store.

        Returns:
            The name; None became one.
        """
        name = _free_name(name)
        if self._vault is not None and name not in self._sessions:
            self._vault.reserve(name)
        return name

    def cancel_reservation(self, name: str) -> None:
        """Let go of a reserved name that was not used; for any thread."""
        if self._vault is not None:
            self._vault.cancel_reservation(name)

    def _new_name(self, name: str | None) -> str:
        name = _free_name(name)
        if name in self._sessions or name in self._unreadable:
            raise ConflictError(
                "id", f"session {plain_name(name)!r} exists already; choose another id"
            )
        self._check_room()
        return name

    def _check_room(self) -> None:
        if len(self._sessions) >= self._max_sessions:
            raise OverloadedError(
                f"{self._max_sessions} sessions exist, which is the limit; delete one first",
                retry_after=60.0,
            )

    def _add(self, session: Session) -> None:
        self._sessions[session.owner] = session
        self._by_key[session.key_id] += 1

    def _remove(self, session: Session) -> None:
        del self._sessions[session.owner]
        self._by_key[session.key_id] -= 1

    def get(self, name: str) -> Session:
        """The session with this id; from any thread.

        Raises:
            NotFoundError: unknown.
            DamagedSessionError: it is stored, but can't be read.
        """
        session = self._sessions.get(name)
        if session is not None:
            return session
        if name in self._unreadable:
            raise DamagedSessionError(self._unreadable[name])
        raise NotFoundError(
            "session",
            f"session {plain_name(name)!r} does not exist; create it with POST /v1/sessions",
        )

    def has(self, session: Session) -> bool:
        """Whether this very session exists still; from any thread."""
        return self._sessions.get(session.owner) is session

    def claim_to_delete(self, name: str) -> None:
        """Make sure that no other server uses a session; for any thread but `delete`'s.

        It does so by itself, but then the engine's thread waits for the store. End it with
        `end_claim`.

        Raises:
            ConflictError: another server has it.
            StoreError: the store fails.
        """
        if self._vault is not None:
            self._vault.claim_to_delete(name)

    def end_claim(self, name: str) -> None:
        """What was claimed has been deleted, or stays; for any thread."""
        if self._vault is not None:
            self._vault.end_claim(name)

    def delete(self, name: str) -> Future[None] | None:
        """Forget a session and its fast weights, and delete what is stored of it.

        Returns:
            Done when nothing is left in the store; None where there is no store.
        Raises:
            NotFoundError: unknown id.
            ConflictError: a request is using it, or another server.
            StoreError: the store fails.
        """
        session = None if name in self._unreadable else self.get(name)
        if session is not None and session.pins:
            raise ConflictError(
                "session", f"session {plain_name(name)!r} is in use by {session.pins} requests"
            )
        if self._vault is not None and not self._vault.has_claim(name):
            self._vault.claim(name)
        self._unreadable.pop(name, None)
        if session is not None:
            self._drop_weights(session)
            self._remove(session)
        return None if self._vault is None else self._vault.delete(name)

    def _drop_weights(self, session: Session) -> AdapterState | None:
        """Take a session's weights out of bank or RAM; they may be fresh ones, which is None."""
        state, session.state = session.state, None
        if session.slot != BASE_SLOT:
            state = self._bank.release(session.slot, session.owner)
            session.slot = BASE_SLOT
        return state

    # --- copies and earlier versions ------------------------------------------------------------

    def fork(self, name: str, new_name: str | None) -> Session:
        """A copy of a session that goes its own way from here.

        Args:
            name: of the parent.
            new_name: of the copy; None makes one.
        """
        parent = self.get(name)
        fresh_name = self._new_name(new_name)
        self.warm(name)
        child = copy.copy(parent)
        child.owner = fresh_name
        child.state = self.state(parent)
        child.slot, child.pins = BASE_SLOT, 0
        child.ledger = copy.deepcopy(parent.ledger)
        child.threshold = copy.copy(parent.threshold)
        child.learned = parent.learned.copy()
        child.pinned, child.kept = [], ()
        child.created = child.last_used = time.time()
        if self._vault is not None:
            self._vault.track_new(child)
        self._add(child)
        return child

    def snapshot(self, name: str) -> Future[Commit]:
        """Mark the current version to be kept beyond the last few; the oldest mark gives way.

        Returns:
            Done once the version is in the store; from then on it stays. It fails with a StoreError
            where the store does.
        Raises:
            ConflictError: there is no store.
        """
        session = self.get(name)
        limit = self._store_config("snapshot").keep_versions
        self.warm(name)
        if session.version not in session.pinned:
            session.pinned = [*session.pinned, session.version][-limit:]
        return self._open_vault().store_now(session)

    def rollback(self, name: str, version: int, loaded: Loaded | None = None) -> Session:
        """Go back to a kept version, as a new version.

        Weights, optimiser, learned chunks, threshold and averages become what they were; the
        ledger and the counts of chunks stay, since what was spent is spent.

        Args:
            name: of the session.
            version: to go back to.
            loaded: what `read_version` gave for it; None: it is read now.
        Raises:
            NotFoundError: unknown session, or the version is not kept.
            ConflictError: a request is using it, or there is no store.
            DamagedSessionError: the version can't be read.
        """
        session = self.get(name)
        self._store_config("roll back")
        self.warm(name)
        if session.pins:
            raise ConflictError(
                "session", f"session {plain_name(name)!r} is in use by {session.pins} requests"
            )
        loaded = self.read_version(name, version) if loaded is None else loaded
        self._drop_weights(session)
        session.state = loaded.state
        apply_learning(session, loaded.facts)
        session.version += 1
        return session

    def read_version(self, name: str, version: int) -> Loaded:
        """A kept version, for `rollback`; from any thread.

        Raises:
            NotFoundError, DamagedSessionError, StoreError.
        """
        self._store_config("roll back")
        return self._open_vault().read_version(name, version)

    def _open_vault(self) -> Vault:
        if self._vault is None:
            raise RuntimeError("there is no store")
        return self._vault

    def _store_config(self, doing: str) -> StoreConfig:
        if self._config is None:
            raise ConflictError(
                "session",
                f"can't {doing}: this server keeps sessions in memory, and no versions of them; "
                "start it with --sessions DIRECTORY, or fork the session in time",
            )
        return self._config

    # --- other servers of the store -------------------------------------------------------------

    def listing(self) -> Listing | None:
        """What the store has, for `refresh`; None where there is none. From any thread.

        Raises:
            StoreError: it can't be read.
        """
        return None if self._vault is None else self._vault.listing()

    def refresh(self, listing: Listing | None) -> None:
        """Learn of sessions that other servers have made, changed and deleted."""
        if self._vault is None or listing is None:
            return
        here = set(self.here())
        stored = {facts.id for facts, _ in listing.readable}
        for name in set(self._sessions) - here - stored:
            self.forget_cold(name)
        for facts, kept in listing.readable:
            if facts.id in here or self._vault.is_deleting(facts.id):
                continue
            session = self._sessions.get(facts.id)
            if session is None:
                session = Session(facts.id, TTTParams(), ephemeral=False, state=None, cold=True)
                self._add(session)
            self._become(session, facts, facts.version, kept)
        self._unreadable = {
            name: why for name, why in listing.unreadable.items() if name not in self._sessions
        }

    def here(self) -> list[str]:
        """Names of the sessions that this server has the lock of."""
        return [] if self._vault is None else [s.owner for s in self._vault.tracked]

    def forget_cold(self, name: str) -> None:
        """A session is not stored any more; nothing where it is in use here."""
        session = self._sessions.get(name)
        if session is not None and session.cold and not session.pins:
            self._remove(session)

    def ask_for(self, name: str) -> None:
        """Ask the server that has a session to let go of it once it is idle; from any thread."""
        self._open_vault().ask_for(name)

    def leave(self, name: str) -> None:
        """Leave a session to the store, once no request uses it; from any thread."""
        if self._vault is not None:
            self._vault.leave(name)

    # --- weights --------------------------------------------------------------------------------

    def state(self, session: Session) -> AdapterState:
        """A copy of the session's fast weights and optimiser state, wherever they are."""
        if session.slot != BASE_SLOT:
            return self._bank.state(session.slot, session.owner)
        if session.cold:
            self.warm(session.owner)
        return self._bank.fresh_state() if session.state is None else session.state.clone()

    def digest(self, session: Session) -> str:
        """SHA-256 of the session's fast weights, in hexadecimal; taken once per version."""
        if session.cold:
            self.warm(session.owner)
        if session.digested is None or session.digested[0] != session.version:
            session.digested = session.version, self.state(session).digest()
        return session.digested[1]

    def fresh_digest(self) -> str:
        """The digest of weights that have learned nothing: they are the base model's."""
        return self._bank.fresh_state().digest()

    def norm(self, session: Session) -> float:
        """L2 distance of the fast weights from fresh ones."""
        weights = self.state(session).weights
        return float((weights - self._bank.fresh_weights.to(weights.device)).norm())

    def is_cold(self, name: str) -> bool:
        """Whether the session would have to be fetched before it can be used; from any thread."""
        if self._vault is None:
            return False
        session = self._sessions.get(name)
        return session is None or session.cold

    def is_unknown(self, name: str) -> bool:
        """Whether the store may have a session that was not there before; from any thread."""
        known = name in self._sessions or name in self._unreadable
        return self._vault is not None and not known

    def fetch(self, name: str) -> Future[Loaded]:
        """Read a cold session in another thread, for `warm`; from any thread.

        Raises:
            NotFoundError: there is no store to look into.
        """
        if self._vault is None:
            self.get(name)
            raise NotFoundError("session", f"session {name!r} is not stored")
        return self._vault.fetch(name)

    def has_fetched(self, name: str, loaded: Loaded) -> bool:
        """Whether `warm` can take this in: nothing was deleted or used since; from any thread."""
        return self._vault is not None and self._vault.has_fetched(name, loaded)

    def warm(self, name: str, loaded: Loaded | None = None) -> Session:
        """Take in a cold session; nothing where it is here already.

        Args:
            name: its id.
            loaded: what `fetch` gave; None: fetch it now, and wait.
        Raises:
            NotFoundError, DamagedSessionError, ConflictError, StoreError.
            OverloadedError: another server has made it, and there is no room for it here.
        """
        session = self._sessions.get(name)
        if self._vault is None or (session is not None and not session.cold):
            return self.get(name)
        if loaded is None or not self._vault.has_fetched(name, loaded):
            loaded = self._vault.fetch(name).result()
        if session is None:
            # Another server has made it, or it was unreadable until now.
            self._check_room()
            session = Session(name, TTTParams(), ephemeral=False, state=None)
            self._unreadable.pop(name, None)
            self._add(session)
        self._become(session, loaded.facts, loaded.version, loaded.kept)
        session.state, session.cold = loaded.state, False
        # Whoever has it fetched is about to use it; it must not be the first to go again.
        session.last_used = time.time()
        self._vault.track_loaded(session, loaded)
        return session

    def _become(self, session: Session, facts: Facts, version: int, kept: tuple[int, ...]) -> None:
        """What was known of a session becomes what the store says."""
        if facts.created != session.created or version < session.version:
            # Another server has made it anew: its versions count from the beginning.
            self.on_reset(session)
        apply_facts(session, facts)
        session.version, session.kept, session.digested = version, kept, None

    def acquire(self, session: Session) -> bool:
        """Pin the session into the bank; False where every slot is pinned by others."""
        if session.slot == BASE_SLOT:
            if not self._bank.has_room and not self._evict():
                return False
            if session.cold:
                self.warm(session.owner)
            state = self._bank.fresh_state() if session.state is None else session.state
            session.slot = self._bank.allocate(session.owner, state, session.version)
            session.state = None
        session.pins += 1
        session.last_used = time.time()
        return True

    def release(self, session: Session) -> None:
        """Unpin; weights that live for one request are wiped with the last pin."""
        session.pins -= 1
        session.last_used = time.time()
        if session.ephemeral and session.pins == 0:
            self._bank.release(session.slot, session.owner)
            session.slot = BASE_SLOT

    def _evict(self) -> bool:
        idle = [s for s in self._sessions.values() if s.slot != BASE_SLOT and s.pins == 0]
        if not idle:
            return False
        oldest = min(idle, key=lambda s: s.last_used)
        state = self._bank.release(oldest.slot, oldest.owner)
        oldest.state = state.to(torch.device("cpu"))
        oldest.slot = BASE_SLOT
        self.evictions += 1
        return True

    # --- the store ------------------------------------------------------------------------------

    def tick(self) -> None:
        """Store what is due, put away what is idle, delete what has expired; returns at once."""
        if self._vault is None:
            return
        self._vault.tick()
        now = time.monotonic()
        if now >= self._next_trim:
            self._next_trim = now + _TRIM_SECONDS
            self._trim(self._vault)
        if now >= self._next_expiry:
            self._next_expiry = now + _EXPIRE_SECONDS
            self._expire(self._vault)

    def next_due(self) -> float | None:
        """Seconds after which `tick` is to be called again; None: nothing is left to do."""
        if self._vault is None or self._config is None:
            return None
        due = self._vault.next_due()
        expiry = None if self._config.ttl is None else _EXPIRE_SECONDS
        return min((each for each in (due, expiry) if each is not None), default=None)

    def flush(self, seconds: float = 60.0, only: list[str] | None = None) -> list[str]:
        """Store everything now; names of sessions for which that did not succeed in time."""
        return [] if self._vault is None else self._vault.flush(seconds, only)

    def close(self, seconds: float = 60.0) -> list[str]:
        """Store everything and let go of the store; names of what could not be stored."""
        if self._vault is None:
            return []
        left = self._vault.flush(seconds)
        self._vault.close()
        return left

    def _trim(self, vault: Vault) -> None:
        config = self._store_config("trim")
        here = [s for s in vault.tracked if s.pins == 0]
        for session in [s for s in here if vault.is_lost(s)]:
            self._put_away(vault, session)
            self.on_reset(session)
        for session in vault.leaving():
            if session.pins == 0 and not session.cold and vault.is_clean(session):
                self._put_away(vault, session)
        idle = sorted(
            (s for s in here if not s.cold and vault.is_clean(s)), key=lambda s: s.last_used
        )
        waiting = sum(s.slot == BASE_SLOT for s in vault.tracked)
        long_ago = time.time() - config.idle_seconds
        for session in idle:
            surplus = session.slot == BASE_SLOT and waiting > config.ram_sessions
            if surplus or session.last_used < long_ago:
                waiting -= session.slot == BASE_SLOT
                self._put_away(vault, session)

    def _put_away(self, vault: Vault, session: Session) -> None:
        self._drop_weights(session)
        session.cold = True
        vault.put_away(session)

    def _expire(self, vault: Vault) -> None:
        ttl = self._store_config("expire").ttl
        if ttl is None:
            return
        limit = time.time() - ttl
        for session in list(self._sessions.values()):
            if session.pins == 0 and session.last_used < limit:
                self._drop_weights(session)
                self._remove(session)
                self.on_reset(session)
                vault.delete(session.owner, limit)


def _free_name(name: str | None) -> str:
    name = new_session_id() if name is None else name
    check_session_id("id", name)
    return name
