"""Servers of one store, as far as sessions go: a bank, a manager, and where the store is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ponderttt.adaptation.actions import NOMINAL, Action
from ponderttt.fast_weights.bank import AdapterBank, AdapterState, StepTag
from ponderttt.sessions.config import StoreConfig
from ponderttt.sessions.files import Files, open_files
from ponderttt.sessions.manager import SessionManager
from ponderttt.sessions.session import Session
from ponderttt.sessions.stats import StoreStats
from ponderttt.sessions.store import SessionStore
from ponderttt.sessions.upkeep import Upkeep
from ponderttt.sessions.vault import Vault
from tests.ponderttt.sessions import stores
from tests.ponderttt.sessions.stores import FaultyFiles

COSTS = {"nominal": NOMINAL, "measured": NOMINAL}


@dataclass
class Server:
    """What one server holds."""

    bank: AdapterBank
    sessions: SessionManager
    files: Files

    def teach(self, name: str) -> AdapterState:
        """Commit some state as a write would, with all that goes with it."""
        session = self.sessions.warm(name)
        assert self.sessions.acquire(session)
        state = _state(self.bank, name, session.version + 1)
        tag = StepTag(session.slot, session.owner, session.version, "WRITE")
        session.version = self.bank.commit(tag, state)
        session.remember(f"{name}-{session.version}", 64)
        session.record(1.0 + session.version, 3.0)
        session.ledger.charge(Action.UPDATE_1, COSTS, 0.25)
        session.threshold.offset += 0.125
        self.sessions.release(session)
        return state

    @property
    def vault(self) -> Vault:
        return stores.attached(self.sessions).vault

    @property
    def upkeep(self) -> Upkeep:
        return stores.attached(self.sessions).upkeep

    @property
    def stats(self) -> StoreStats:
        stats = self.sessions.store_stats()
        assert stats is not None
        return stats

    def tick_until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Let time pass until `condition()` holds."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"not within {seconds} s: {self.stats}"
            self.sessions.tick()
            time.sleep(0.005)


@dataclass
class Place:
    """Where servers keep their sessions."""

    directory: Path
    url: str
    files: Files | None = None

    def start(self, slots: int = 2, **config: float | int | None) -> Server:
        """A server that begins with what is stored."""
        files = self.files or open_files(self.url)
        settings = StoreConfig(self.url, **config)  # type: ignore[arg-type]
        bank = stores.make_bank(self.directory, slots)
        sessions = SessionManager(bank, 16)
        store = SessionStore(files, stores.make_codec(self.directory), settings.keep_versions)
        sessions.attach(store, settings)
        return Server(bank, sessions, files)


def _state(bank: AdapterBank, name: str, number: int) -> AdapterState:
    seed = sum(name.encode()) * 1000 + number
    noise = torch.randn(3, bank.layout.size, generator=torch.Generator().manual_seed(seed))
    return AdapterState(bank.fresh_weights + 0.01 * noise[0], noise[1], noise[2].abs(), number)


def facts(session: Session) -> dict[str, object]:
    """Everything about a session that must survive."""
    names = ("owner", "defaults", "version", "ledger", "threshold", "learned",
             "loss_ema", "cost_ema", "chunks", "learned_tokens", "rollbacks", "created",
             "pinned")  # fmt: skip
    return {name: getattr(session, name) for name in names}


def faults(place: Place) -> stores.Faults:
    """Those of a store that has them."""
    assert isinstance(place.files, FaultyFiles)
    return place.files.faults
