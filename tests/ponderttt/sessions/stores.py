"""Stores for tests: small ones, on any file system, and one that fails on demand."""

from __future__ import annotations

import errno
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from ponderttt.adaptation.params import TTTParams
from ponderttt.fast_weights.bank import AdapterBank, AdapterState
from ponderttt.fast_weights.layout import AdapterLayout, LoRAConfig
from ponderttt.sessions.codec import StateCodec
from ponderttt.sessions.files import Files, LocalFiles, open_files
from ponderttt.sessions.manager import Attached, SessionManager
from ponderttt.sessions.record import Facts, facts_of
from ponderttt.sessions.session import Session
from ponderttt.sessions.store import SessionStore
from tests.ponderttt.engine import harness

MAX_NORM = 100.0


@cache
def make_layout(directory: Path) -> AdapterLayout:
    """One block of the tiny model, rank 1: 1,600 numbers or so."""
    decoder, _ = harness.load(directory)
    return AdapterLayout(decoder, LoRAConfig(rank=1, layers=1))


@cache
def make_codec(directory: Path, model: str = "tiny") -> StateCodec:
    """The codec of that layout."""
    return StateCodec(make_layout(directory), fresh(directory), model, MAX_NORM)


def fresh(directory: Path) -> torch.Tensor:
    """What a session begins with."""
    return make_layout(directory).fresh(torch.device("cpu"), torch.float32)


def make_bank(directory: Path, slots: int = 2) -> AdapterBank:
    """A bank of few slots."""
    return AdapterBank(make_layout(directory), slots, torch.device("cpu"), torch.float32)


def make_store(directory: Path, url: str | Path, keep: int = 3) -> SessionStore:
    """A store of the tiny model's sessions."""
    return SessionStore(open_files(str(url)), make_codec(directory), keep)


def attached(sessions: SessionManager) -> Attached:
    """What a manager has of the store that it was given."""
    found = sessions._attached
    assert found is not None
    return found


def memory_url() -> str:
    """A place in memory that nobody else uses."""
    return f"memory://sessions-{uuid.uuid4().hex}"


def make_state(directory: Path, number: int) -> AdapterState:
    """Some state, the same for the same number."""
    noise = torch.randn(
        3, make_layout(directory).size, generator=torch.Generator().manual_seed(number)
    )
    return AdapterState(fresh(directory) + 0.01 * noise[0], noise[1], noise[2].abs(), number)


def make_facts(codec: StateCodec, name: str = "repo", version: int = 1) -> Facts:
    """Of a session that has learned a little."""
    session = Session(name, TTTParams(budget=2.5), ephemeral=False, state=None, version=version)
    session.remember("a" * 32, 64)
    session.record(2.0, 3.0)
    return facts_of(session, codec.model, codec.layout)


def same(one: AdapterState, two: AdapterState) -> bool:
    """Bit by bit."""
    pairs = ((one.weights, two.weights), (one.first, two.first), (one.second, two.second))
    return one.step == two.step and all(torch.equal(a, b) for a, b in pairs)


@dataclass
class Faults:
    """What is wrong with a file system now.

    Args:
        error: errno that every write gives, after writing half of it; None: none.
        reads: errno that every read gives.
        share: of the calls that fail at random.
        seconds: that every call takes longer.
    """

    error: int | None = None
    reads: int | None = None
    share: float = 0.0
    seconds: float = 0.0
    draws: random.Random = field(default_factory=lambda: random.Random(0))
    failed: int = 0

    def strike(self, number: int | None) -> None:
        """Raise what is to be raised."""
        time.sleep(self.seconds)
        if number is None and self.draws.random() < self.share:
            number = errno.EIO
        if number is not None:
            self.failed += 1
            raise OSError(number, errno.errorcode[number])


class FaultyFiles(LocalFiles):
    """Local files with faults that can be switched on and off."""

    def __init__(self, root: Path) -> None:
        self.faults = Faults()
        super().__init__(root)

    def _read(self, path: str) -> bytes:
        self.faults.strike(self.faults.reads)
        return super()._read(path)

    def _write(self, path: str, data: bytes) -> None:
        try:
            self.faults.strike(self.faults.error)
        except OSError:
            if self.faults.error == errno.ENOSPC:  # what fitted is there
                super()._write(path, data[: len(data) // 2])
            raise
        super()._write(path, data)


class Crash(BaseException):
    """The process ends here; nothing catches it."""


class CrashingFiles(Files):
    """Stops for good before a given change of the file system; counts the changes."""

    def __init__(self, inner: Files, at: int | None = None) -> None:
        super().__init__(inner._fs, inner._root, inner.url)
        self._inner = inner
        self.is_local = inner.is_local
        self._at = at
        self.changes = 0

    def _change(self, change: Callable[[], None]) -> None:
        if self.changes == self._at:
            raise Crash
        self.changes += 1
        change()

    def read(self, path: str) -> bytes | None:
        return self._inner.read(path)

    def names(self, directory: str = "") -> list[str]:
        return self._inner.names(directory)

    def sync(self, *directories: str) -> None:
        self._inner.sync(*directories)

    def write(self, path: str, data: bytes) -> None:
        # Half of it, then the rest: both are instants at which a crash can come.
        self._change(lambda: self._inner.write(path, data[: len(data) // 2]))
        self._change(lambda: self._inner.write(path, data))

    def replace(self, path: str, data: bytes) -> None:
        self._change(lambda: self._inner.replace(path, data))

    def create(self, path: str, data: bytes) -> bool:
        made: list[bool] = []
        self._change(lambda: made.append(self._inner.create(path, data)))
        return made[0]

    def remove(self, path: str) -> None:
        # One by one, as a file system does it.
        for name in self._inner.names(path) if "." not in path.rsplit("/", 1)[-1] else []:
            self._change(lambda each=f"{path}/{name}": self._inner.remove(each))  # type: ignore[misc]
        self._change(lambda: self._inner.remove(path))
