"""Kill a process at random instants while it saves sessions, and see what is left each time.

A child process opens the store, takes its sessions up where the last child left them, and changes
and saves them without pause; now and then it marks a version, goes back to one, forks a session or
deletes the fork. It is killed (SIGKILL) after a random time. Then every session is read back: it
must be at a committed version, bit for bit what that version was, no older than the last commit
that the child had heard of, with the versions that it was told are kept; what it was told is
deleted must be gone; and what is lost must not be older than the write delay plus the time that a
commit took.

    python benchmarks/session_kills.py --model smollm2-135m --kills 200 --json out.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.config import served_name
from ponderttt.errors import ConflictError, NotFoundError
from ponderttt.fast_weights.bank import AdapterBank, AdapterState, StepTag
from ponderttt.fast_weights.layout import AdapterLayout, LoRAConfig
from ponderttt.models import store as models
from ponderttt.models.checkpoint import load_decoder
from ponderttt.sessions.codec import StateCodec
from ponderttt.sessions.config import StoreConfig
from ponderttt.sessions.files import open_files
from ponderttt.sessions.manager import SessionManager
from ponderttt.sessions.record import RECORD_FILE
from ponderttt.sessions.store import Commit, SessionStore

NAMES = ("first", "second", "third")
FORK = "fork"  # of the first
# Share of the rounds in which a session is marked, rolled back, forked or deleted.
_SELDOM = 0.1


@dataclass(frozen=True)
class Lab:
    """What parent and children share.

    Args:
        bank, codec: of the model's fast weights.
        config: of the store.
        noise: [P].
        journal: what the last child did, a line per event: monotonic time, event, session, version.
    """

    bank: AdapterBank
    codec: StateCodec
    config: StoreConfig
    noise: torch.Tensor
    journal: Path

    def store(self) -> SessionStore:
        """The store, opened."""
        return SessionStore(open_files(self.config.url), self.codec, self.config.keep_versions)

    def content(self, name: str, version: int) -> AdapterState:
        """What a version holds: another for each, but the same every time, and soon made."""
        factor = 1.0 + zlib.crc32(f"{name}/{version}".encode()) / 2**32
        noise = self.noise * factor
        weights = self.bank.fresh_weights + 1e-3 * noise
        return AdapterState(weights, noise, noise.abs(), version)


def child(lab: Lab) -> None:
    """Change and save sessions until killed."""
    sessions = SessionManager(lab.bank, 16)
    sessions.attach(lab.store(), lab.config)

    def note(event: str, name: str, version: int) -> None:
        os.write(log, f"{time.monotonic():.6f} {event} {name} {version}\n".encode())

    for name in NAMES:
        if name not in sessions.names():
            sessions.create(name, TTTParams())
        sessions.warm(name)
    sessions.flush()
    log = os.open(lab.journal, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # its life begins
    told: dict[str, int] = {}
    rare = Rare(sessions, note)
    while True:
        rare.round()
        for name in NAMES:
            session = sessions.warm(name)
            if session.version - max(session.kept, default=-1) < 3:
                sessions.acquire(session)
                tag = StepTag(session.slot, name, session.version, "WRITE")
                session.version = lab.bank.commit(tag, lab.content(name, session.version + 1))
                sessions.release(session)
                session.remember(f"{session.version:032d}")
                note("changed", name, session.version)
            else:
                session.chunks += 1  # a skipped chunk: `session.json` alone is replaced
            sessions.tick()
            committed = max(session.kept, default=-1)
            if committed > told.get(name, -1):
                told[name] = committed
                note("committed", name, committed)
        time.sleep(0.001)


class Rare:
    """What happens to sessions now and then, and what the child has been told of it.

    Args:
        sessions: of the child.
        note: writes an event, a session's name and a version to the journal.
    """

    def __init__(self, sessions: SessionManager, note: Callable[[str, str, int], None]) -> None:
        self._sessions = sessions
        self._note = note
        self._draws = random.Random(time.time_ns())
        self._marking: tuple[Future[Commit], int] | None = None
        self._deleting: Future[None] | None = None

    def round(self) -> None:
        """Do something, or not, and hear of what was done before."""
        self._hear()
        if self._draws.random() < _SELDOM:
            self._draws.choice([self._mark, self._roll_back, self._fork_or_delete])()

    def _hear(self) -> None:
        if self._marking is not None and self._marking[0].done():
            self._marking[0].result()
            self._note("marked", "second", self._marking[1])
            self._marking = None
        if self._deleting is not None and self._deleting.done():
            self._deleting.result()
            self._note("deleted", FORK, 0)
            self._deleting = None

    def _mark(self) -> None:
        if self._marking is None:
            version = self._sessions.get("second").version
            self._marking = self._sessions.snapshot("second"), version

    def _roll_back(self) -> None:
        session = self._sessions.get("third")
        version = min(session.kept)
        with suppress(NotFoundError):  # a commit has made it one too many
            self._sessions.rollback("third", version)
            self._note("rolled_back", "third", version)
            self._note("changed", "third", session.version)

    def _fork_or_delete(self) -> None:
        if FORK in self._sessions.names():
            self._note("deleting", FORK, 0)
            self._deleting = self._sessions.delete(FORK)
        elif self._deleting is None:
            with suppress(ConflictError):  # the last one is only just gone
                self._note("forking", FORK, self._sessions.fork("first", FORK).version)


def run_and_kill(lab: Lab, seconds: float) -> tuple[float, float]:
    """One child's life, from when it has all sessions; Unix time of that, and when it died."""
    lab.journal.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            child(lab)
        finally:
            os._exit(1)
    while not lab.journal.exists():
        time.sleep(0.0005)
    begun = time.time()
    time.sleep(seconds)
    died = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        raise SystemExit("the child ended by itself; its traceback stands above")
    return begun, died


def is_torn(root: Path, begun: float) -> bool:
    """Whether a commit that began after `begun` (Unix time) was left unfinished."""
    for path in root.glob("*/v*/*"):
        unfinished = path.suffix == ".tmp" or not (path.parent / RECORD_FILE).exists()
        if unfinished and path.stat().st_mtime > begun:
            return True
    return False


@dataclass
class Findings:
    """What the kills have shown.

    Args:
        kills: so far.
        torn: kills amid a commit, which left an unfinished version behind.
        lost: changes that were lost.
        oldest_lost: age in seconds of the oldest of them.
        events: what the children have noted, by kind.
        versions: newest version of each session.
    """

    kills: int = 0
    torn: int = 0
    lost: int = 0
    oldest_lost: float = 0.0
    events: Counter[str] = field(default_factory=Counter)
    versions: dict[str, int] | None = None


def check(lab: Lab, begun: float, died: float, findings: Findings) -> None:
    """Read every session back; AssertionError where something is wrong."""
    store = lab.store()
    lines = [line.split() for line in lab.journal.read_text().splitlines(keepends=False)]
    events = [line for line in lines if len(line) == 4]
    findings.events.update(event[1] for event in events)
    versions: dict[str, int] = dict(findings.versions or {})
    listing = store.listing()
    assert not listing.unreadable, listing.unreadable
    fork_events = [event[1] for event in events if event[2] == FORK]
    if fork_events:
        versions.pop(FORK, None)  # another one
    if fork_events[-1:] == ["deleted"]:
        assert FORK not in {facts.id for facts, _ in listing.readable}, "it was deleted"
    for name in (facts.id for facts, _ in listing.readable):
        loaded = store.load(name)
        assert not loaded.damaged, loaded.damaged
        version = loaded.facts.version
        assert version >= versions.get(name, 0), f"{name} went back from {versions} to {version}"
        made = loaded.state.step  # when its content was new: others went back to it
        assert made <= version
        if made:
            wanted = lab.content("first" if name == FORK else name, made)
            for got, want in zip(tensors(loaded.state), tensors(wanted), strict=True):
                assert torch.equal(got, want), f"{name}, version {version} is not what was saved"
            assert loaded.facts.learned[-1] == f"{made:032d}"
        assert made == version or name in ("third", FORK), f"{name} went back to {made}"
        mine = [event for event in events if event[2] == name]
        marked = [int(event[3]) for event in mine if event[1] == "marked"]
        assert set(marked[-1:]) <= set(loaded.kept), f"{marked[-1:]} of {name} is not kept"
        heard = [int(e[3]) for e in mine if e[1] == "committed"]
        assert version >= max(heard, default=0), f"{name} is at {version}, committed were {heard}"
        for moment, event, _, number in mine:
            if event == "changed" and int(number) > version:
                findings.lost += 1
                findings.oldest_lost = max(findings.oldest_lost, died - float(moment))
        versions[name] = version
    findings.kills += 1
    findings.torn += is_torn(Path(lab.config.url), begun)
    findings.versions = versions


def tensors(state: AdapterState) -> tuple[torch.Tensor, ...]:
    """Everything that is to be the same."""
    return state.weights, state.first, state.second, torch.tensor(state.step)


def commit_seconds(lab: Lab, repeats: int = 5) -> float:
    """Median time of a commit by itself."""
    store, times = lab.store(), []
    sessions = SessionManager(lab.bank, 16)
    sessions.attach(store, lab.config)
    session = sessions.create("timed", TTTParams())
    for _ in range(repeats):
        begun = time.perf_counter()
        sessions.flush()
        times.append(time.perf_counter() - begun)
        session.version += 1
        session.state = lab.content("timed", session.version)
    deleted = sessions.delete("timed")
    if deleted is not None:
        deleted.result()
    sessions.close()
    return statistics.median(times)


def make_lab(model: str, url: str, delay: float, rank: int | None) -> Lab:
    """The fast weights of a model; the model itself is let go of."""
    decoder = load_decoder(models.resolve(model, progress=False))
    config = LoRAConfig() if rank is None else LoRAConfig(rank=rank, alpha=2.0 * rank)
    layout = AdapterLayout(decoder, config)
    bank = AdapterBank(layout, len(NAMES) + 1, torch.device("cpu"), torch.float32)
    codec = StateCodec(layout, bank.fresh_weights, served_name(model), max_norm=1e6)
    noise = torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    store = StoreConfig(url, write_delay=delay)
    return Lab(bank, codec, store, noise, Path(url).with_suffix(".journal"))


def run(lab: Lab, kills: int, longest: float, seed: int, say: Callable[[str], None]) -> Findings:
    """Kill so many children, checking after each."""
    draws, findings = random.Random(seed), Findings()
    for number in range(kills):
        check(lab, *run_and_kill(lab, draws.uniform(0.0, longest)), findings)
        if (number + 1) % 20 == 0:
            say(f"{number + 1} kills: {findings}")
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--delay", type=float, default=0.01, help="write delay in seconds")
    parser.add_argument("--longest", type=float, default=0.5, help="longest life, seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", help="of the store; by default a temporary one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # and none but this thread is alive when children are made
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        url = str(Path(directory) / "sessions")
        lab = make_lab(options.model, url, options.delay, options.rank)
        pid = os.fork()
        if pid == 0:  # threads of the measurement must not be alive here
            (Path(directory) / "seconds").write_text(str(commit_seconds(lab)))
            os._exit(0)
        os.waitpid(pid, 0)
        seconds = float((Path(directory) / "seconds").read_text())
        begun = time.monotonic()
        findings = run(lab, options.kills, options.longest, options.seed, print)
        result = {
            "model": served_name(options.model),
            "kills": findings.kills,
            "seed": options.seed,
            "bytes_per_session": 12 * lab.codec.layout.size,
            "write_delay_seconds": options.delay,
            "commit_seconds": seconds,
            "kills_within_a_commit": findings.torn,
            "sessions_unreadable": 0,
            "changes_lost": findings.lost,
            "oldest_lost_seconds": findings.oldest_lost,
            "events": dict(findings.events),
            "last_versions": findings.versions,
            "seconds": time.monotonic() - begun,
        }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
