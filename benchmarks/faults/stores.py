"""A server whose store fails, is slow, full or read-only; with a tiny random model, over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from benchmarks.faults.check import Result, check
from ponderttt.engine import core as engine_core
from ponderttt.sessions.stats import StoreStats
from tests.helpers import source_text
from tests.ponderttt.sessions.small_disk import Filler
from tests.ponderttt.sessions.stores import Faults, FaultyFiles
from tests.ponderttt.sessions.test_small_disk import MOUNT, NAMESPACE
from tests.server.live import PROMPT, Live, live_server

NAMES = ("a", "b", "c", "d")
TEXT = source_text()
ROOT = Path(__file__).parents[2]
_SHARES, _SLOW_SECONDS, _DISK = (0.1, 0.3), 0.3, "8m"


class Plain:
    """Requests without a session, one after the other in a thread, and what came of them."""

    def __init__(self, live: Live) -> None:
        self.statuses: Counter[int] = Counter()
        self.seconds: list[float] = []
        self.unsaved_seconds = 0.0
        self._live, self._stop = live, threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Plain:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        body = {"prompt": PROMPT, "max_tokens": 4}
        while not self._stop.wait(0.02):
            begun = time.perf_counter()
            self.statuses[self._live.http.post("/v1/completions", json=body).status_code] += 1
            self.seconds.append(time.perf_counter() - begun)
            self.unsaved_seconds = max(self.unsaved_seconds, stats(self._live).unsaved_seconds)

    def result(self) -> Result:
        """Counts; fails where one was not answered, or none was asked."""
        check(set(self.statuses) == {200}, self.statuses)
        return {
            "requests without session": self.statuses.total(),
            "of these failed": self.statuses.total() - self.statuses[200],
            "slowest of these, s": max(self.seconds),
            "longest time unsaved, s": self.unsaved_seconds,
        }


def stats(live: Live) -> StoreStats:
    """Of the server's store."""
    found = live.core.sessions.store_stats()
    assert found is not None
    return found


def wait_saved(live: Live, seconds: float = 300.0) -> None:
    """Wait until the store has everything."""
    until = time.monotonic() + seconds
    while stats(live).unsaved or not all(live.session(name)["kept_versions"] for name in NAMES):
        check(time.monotonic() < until, stats(live))
        time.sleep(0.05)


@contextmanager
def faulty_server(tiny: Path, url: Path) -> Iterator[tuple[Live, Faults]]:
    """A server with four sessions in a store whose faults can be switched on."""
    files = FaultyFiles(url)
    with (
        patch.object(engine_core, "open_files", lambda _: files),
        live_server(tiny, sessions=str(url), session_write_delay=0.0) as live,
    ):
        for name in NAMES:
            live.new_session(id=name, gate="fixed", chunk_size=64)
        wait_saved(live)
        yield live, files.faults


def teach_all(live: Live, lessons: int, first: int = 0) -> None:
    """Teach the sessions in turn; every request is to be answered."""
    for number in range(first, first + lessons):
        live.adapt(NAMES[number % len(NAMES)], TEXT[100 * number : 100 * number + 300])
        time.sleep(0.05)


def digests(live: Live) -> dict[str, str]:
    """Of all sessions."""
    return {name: str(live.session(name)["digest"]) for name in NAMES}


def lost(tiny: Path, url: Path, wanted: dict[str, str]) -> int:
    """Sessions that are not after a restart what they were."""
    with live_server(tiny, sessions=str(url)) as live:
        found = digests(live)
    check(found == wanted, (found, wanted))
    return sum(found[name] != wanted[name] for name in NAMES)


def troubled(tiny: Path, url: Path, seed: int, **faults: float) -> Result:
    """200 documents learned in a store with these faults, until all is saved in spite of them."""
    with faulty_server(tiny, url) as (live, switches):
        switches.draws.seed(seed)
        before = stats(live)
        with Plain(live) as plain:
            for key, value in faults.items():
                setattr(switches, key, value)
            teach_all(live, 200)
            wait_saved(live)
        after, wanted = stats(live), digests(live)
        switches.seconds = 0.0
    return {
        "documents learned": 200,
        "commits": after.commits - before.commits,
        "attempts that failed": after.failures - before.failures,
        "sessions": len(NAMES),
        "sessions lost": lost(tiny, url, wanted),
        **plain.result(),
    }


def failing(tiny: Path, scratch: Path, seed: int) -> Result:
    """A share of the reads and writes raises EIO."""
    return {
        f"{share:.0%}": troubled(tiny, scratch / f"failing-{share}", seed, share=share)
        for share in _SHARES
    }


def slow(tiny: Path, scratch: Path, seed: int) -> Result:
    """Every read and write takes longer."""
    result = troubled(tiny, scratch / "slow", seed, seconds=_SLOW_SECONDS)
    return {"seconds per call": _SLOW_SECONDS} | result


def disk(tiny: Path, scratch: Path, seed: int) -> Result:
    """Run `on_disk` as root of a namespace of its own, on a small disk."""
    mount = scratch / "disk"
    mount.mkdir()
    command = (
        MOUNT.replace("size=192k", f"size={_DISK}")
        + ' && exec "$2" -m benchmarks.faults --disk "$3" "$1"'
    )
    run = [*NAMESPACE, command, "sh", str(mount), sys.executable, str(tiny)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    check(done.returncode == 0, done.stderr)
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def on_disk(tiny: Path, mount: Path) -> Result:
    """Full while sessions learn, then read-only when the server starts."""
    url = mount / "sessions"
    with faulty_server(tiny, url) as (live, _), Plain(live) as plain:
        teach_all(live, 8)
        wait_saved(live)
        committed = {name: live.session(name)["version"] for name in NAMES}
        filler = Filler(mount / "filler")
        teach_all(live, 40, first=8)
        time.sleep(1.0)
        unsaved, failures = stats(live).unsaved, stats(live).failures
        attached = live.core.sessions._attached
        assert attached is not None
        loaded = {name: attached.vault._store.load(name) for name in NAMES}
        intact = sum(
            not each.damaged and each.facts.version == committed[n] for n, each in loaded.items()
        )
        filler.stop()
        wait_saved(live)
        wanted = digests(live)
    check(intact == unsaved == len(NAMES), (intact, unsaved))
    subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
    with live_server(tiny, sessions=str(url)) as live, Plain(live) as beside:
        listed = len(live.http.get("/v1/sessions").json()["data"])
        body = {"prompt": PROMPT, "max_tokens": 1}
        refused = Counter(
            live.http.post("/v1/completions", json=body | {"ttt": {"session": n}}).status_code
            for n in NAMES
        )
        while beside.statuses.total() < 100:
            time.sleep(0.1)
    subprocess.run(["mount", "-o", "remount,rw", mount], check=True)
    return {
        "sessions": len(NAMES),
        "full: documents learned": 40,
        "full: attempts to save that failed": failures,
        "full: sessions whose last commit was intact": intact,
        "full": plain.result(),
        "read-only: sessions listed": listed,
        "read-only: requests with a stored session, by status": dict(refused),
        "read-only": beside.result(),
        "sessions lost": lost(tiny, url, wanted),
    }
