"""Inject what may go wrong, count what comes of it, and fail where anything was lost.

    .venv/bin/python benchmarks/faults.py --json benchmarks/results/faults.json

    damaged   random damage to stored sessions (a tiny random model: its files are checked alike)
    failing   a store of which 10 or 30 % of the reads and writes fail, over HTTP (tiny model);
              a commit writes four files
    slow      a store each of whose calls takes 0.3 s longer, over HTTP (tiny model)
    disk      a small disk that is really full, then really read-only, over HTTP (tiny model)
    updates   updates that explode, climb, give NaN or run out of memory (smollm2-135m)
    isolation a secret that one session has learned, and its traffic (smollm2-135m)
    cold      a request to a session that is in the store alone (smollm2-135m)

`--only` runs some of them and leaves what the JSON file says of the others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ponderttt.adaptation import update
from ponderttt.adaptation.params import TTTParams
from ponderttt.engine import core as engine_core
from ponderttt.errors import DamagedSessionError
from ponderttt.models import store as models
from ponderttt.sessions.record import RECORD_FILE
from ponderttt.sessions.vault import StoreStats
from tests.helpers import make_tiny_llama, source_text
from tests.ponderttt.sessions.small_disk import Filler
from tests.ponderttt.sessions.stores import Faults, FaultyFiles, same
from tests.ponderttt.sessions.test_small_disk import MOUNT, NAMESPACE
from tests.ponderttt.sessions.test_vault import Place
from tests.server import test_isolation as isolation_tests
from tests.server.live import PROMPT, Live, live_server
from tests.server.test_auth import bearer_of

Result = dict[str, Any]
MODEL = "smollm2-135m"
NAMES = ("a", "b", "c", "d")
TEXT = source_text()
_SHARES, _SLOW_SECONDS, _DISK = (0.1, 0.3), 0.3, "8m"


# --- damaged files --------------------------------------------------------------------------------


def damage(path: Path, kind: str, draws: random.Random) -> None:
    """Change a file for certain: the same bytes would be no damage."""
    data = bytearray(path.read_bytes())
    at = draws.randrange(len(data))
    match kind:
        case "bit":
            data[at] ^= 1 << draws.randrange(8)
        case "truncated":
            del data[at:]
        case "zeros":
            while not any(data[at : at + 64]):
                at = draws.randrange(len(data))
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        case "removed":
            path.unlink()
            return
    path.write_bytes(data)


def damaged(tiny: Path, scratch: Path, seed: int, count: int = 300) -> Result:
    """Damage the newest of three versions, then, for a sixth as many sessions, all three."""
    draws, tally = random.Random(seed), Counter[str]()
    server = Place(tiny, str(scratch / "whole")).start()
    server.sessions.create("repo", TTTParams())
    states = {}
    for version in (1, 2, 3):
        states[version] = server.teach("repo")
        server.sessions.flush()
    server.sessions.close()
    kinds: Counter[str] = Counter()
    for number in range(count + count // 6):
        root = scratch / "damaged"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(scratch / "whole", root)
        spoilt = (3,) if number < count else (1, 2, 3)
        for version in spoilt:
            files = sorted((root / "repo" / f"v{version:08d}").iterdir())
            # Without its record a version was never committed, whoever removed it.
            kind = draws.choice(("bit", "truncated", "zeros", "removed"))
            kinds[kind] += 1
            damage(draws.choice([f for f in files if (kind, f.name) != ("removed", RECORD_FILE)]),
                   kind, draws)  # fmt: skip
        again = Place(tiny, str(root)).start()
        try:
            state = again.sessions.state(again.sessions.warm("repo"))
            tally["found"] += again.stats.recoveries
            tally["back at the version before"] += spoilt == (3,) and same(state, states[2])
            tally["wrong weights"] += not (spoilt == (3,) and same(state, states[2]))
        except DamagedSessionError:
            tally["refused" if spoilt == (1, 2, 3) else "lost"] += 1
        again.sessions.close()
    whole = {"newest damaged": count, "all damaged": count // 6, "kinds": dict(kinds)}
    keys = ("found", "back at the version before", "refused", "wrong weights", "lost")
    check(tally["found"] == count and tally["refused"] == count // 6, tally)
    check(tally["wrong weights"] == tally["lost"] == 0, tally)
    return whole | {key: tally[key] for key in keys}


# --- stores in trouble, over HTTP -----------------------------------------------------------------


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
    command = MOUNT.replace("size=192k", f"size={_DISK}") + ' && exec "$2" "$3" --disk "$1" "$4"'
    run = [*NAMESPACE, command, "sh", mount, sys.executable, __file__, tiny]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
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
        vault = live.core.sessions._vault
        assert vault is not None
        loaded = {name: vault._store.load(name) for name in NAMES}
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


# --- learning -------------------------------------------------------------------------------------


def bad_step(kind: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    """An optimiser step that goes wrong, after a real forward and backward."""
    right = update.adam_rows

    def step(weights: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        if kind == "out of memory":
            raise torch.OutOfMemoryError("no room")
        new, first, second = right(weights, *rest)
        factor = {"NaN": math.nan, "exploding": 1e6, "climbing": -300.0}[kind]
        return weights + factor * (new - weights), first, second

    return step


def updates(tiny: Path, scratch: Path, seed: int, each: int = 15) -> Result:
    """Failed updates of one session: nothing is left of them, and the other answers as before."""
    draws, directory = random.Random(seed), models.resolve(MODEL, progress=False)
    causes: dict[str, Counter[str]] = {}
    with isolation_tests.server(directory, scratch, learning_rate=None) as live:
        live.http.headers.update(bearer_of("root"))
        isolation_tests.teach(live, "alice", TEXT[-1200:])
        sessions = live.core.sessions
        mine = sessions.get("alice~repo")
        state, version = sessions.state(mine), mine.version
        check(version > 0, version)
        probe = isolation_tests.PROBE
        answers = isolation_tests.scores(live, "bob", probe)
        same_weights = same_answers = 0
        for kind in ("NaN", "exploding", "climbing", "out of memory") * each:
            at = draws.randrange(len(TEXT) - 400)
            with patch.object(update, "adam_rows", bad_step(kind)):
                report = isolation_tests.teach(live, "alice", TEXT[at : at + 250])
            outcomes = [str(chunk["rollback"]) for chunk in report["chunks"]
                        if chunk["reason"] != "short"]  # fmt: skip
            causes.setdefault(kind, Counter()).update(outcomes)
            same_weights += same(sessions.state(mine), state) and mine.version == version
            same_answers += torch.equal(isolation_tests.scores(live, "bob", probe), answers)
        counted = sum(v for (k, _), v in live.metrics().items() if k == "ponderttt_rollbacks_total")
        tried = sum(tally.total() for tally in causes.values())
        check(counted == tried == mine.rollbacks, (counted, causes, mine.rollbacks))
        check(same_weights == same_answers == 4 * each, (same_weights, same_answers))
        check(not any(tally["None"] for tally in causes.values()), causes)
        after = isolation_tests.teach(live, "alice", TEXT[2000:3200])
        check(after["version_after"] > version, after)
    return {
        "model": MODEL,
        "requests": 4 * each,
        "updates injected": tried,
        "rolled back, by what they did": {kind: dict(tally) for kind, tally in causes.items()},
        "counted in ponderttt_rollbacks_total": counted,
        "requests after which weights and moments were the same bit by bit": same_weights,
        "requests after which another session's answer was the same bit by bit": same_answers,
    }


def isolation(tiny: Path, scratch: Path, seed: int) -> Result:
    """Alice's and a newcomer's answers: Bob absent; Bob with a secret, learning beside them."""
    tests, directory = isolation_tests, models.resolve(MODEL, progress=False)
    found: dict[bool, dict[str, torch.Tensor]] = {}
    means: dict[str, float] = {}
    asked: Counter[int] = Counter()

    async def ask(live: Live, present: bool) -> dict[str, torch.Tensor]:
        answers = {}
        async with tests.traffic(live, "bob", 4 if present else 0) as statuses:
            for number, text in enumerate(tests.TEXTS[:3]):
                await asyncio.to_thread(tests.teach, live, "alice", text)
                for name in ("alice", "few"):
                    for kind, prompt in (("probe", tests.PROBE), ("secret", tests.SECRET)):
                        scores = await asyncio.to_thread(tests.scores, live, name, prompt)
                        answers[f"{name} {kind} {number}"] = scores
        asked.update(statuses)
        return answers

    for present in (False, True):
        with tests.server(directory, scratch, ("alice", "bob", "few"), learning_rate=None) as live:
            for shift in range(8 if present else 0):
                tests.teach(live, "bob", f"{'#' * shift}\n{tests.SECRET * 6}", "UPDATE_4")
            means["Bob" if present else "Bob, before"] = tests.mean_score(live, "bob", tests.SECRET)
            found[present] = asyncio.run(ask(live, present))
    far = {
        f"{name}, {kind}": max(
            float((found[True][key] - found[False][key]).abs().max())
            for key in found[True] if key.startswith(f"{name} {kind}")
        )
        for name in ("alice", "few") for kind in ("probe", "secret")
    }  # fmt: skip
    for name, label in (("alice", "Alice"), ("few", "newcomer")):
        for present, how in ((False, "Bob absent"), (True, "Bob learning beside")):
            scores = found[present][f"{name} secret 2"].unflatten(0, (6, -1))[0]
            means[f"{label}, {how}"] = float(scores.mean())
    check(max(far.values()) < tests.CROWDED_TOLERANCE and set(asked) == {200}, (far, asked))
    check(means["Bob"] > means["Alice, Bob learning beside"] + 1.0, means)
    return {
        "model": MODEL,
        "requests of Bob meanwhile": asked.total(),
        "largest difference of a log-probability, Bob present and absent": far,
        "mean log-probability of the secret's tokens, nats": means,
    }


def cold(tiny: Path, scratch: Path, seed: int, rounds: int = 30) -> Result:
    """A request to a cold session and, right after it, the same to a warm one."""
    directory = models.resolve(MODEL, progress=False)
    options = {"session_idle_seconds": 0.3, "session_write_delay": 0.0, "prefix_cache_bytes": 0}
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    with live_server(
        directory, sessions=str(scratch / "cold"), learning_rate=None, **options
    ) as live:
        live.new_session(id="repo", gate="fixed", chunk_size=64)
        live.adapt("repo", TEXT[:1200])
        body = {"prompt": "def main():", "max_tokens": 1, "ttt": {"session": "repo", "gate": "off"}}
        for number in range(rounds + 1):
            until = time.monotonic() + 60
            while not live.core.sessions.is_cold("repo"):
                check(time.monotonic() < until, "the session stays warm")
                time.sleep(0.05)
            for kind, known in times.items():
                begun = time.perf_counter()
                live.http.post("/v1/completions", json=body).raise_for_status()
                if number:  # the first one warms up
                    known.append(time.perf_counter() - begun)
        loads, seconds = stats(live).loads, stats(live).load_seconds
    check(loads == rounds + 1, loads)
    return {
        "model": MODEL,
        "rounds": rounds,
        **{f"{kind}, median ms": 1e3 * statistics.median(known) for kind, known in times.items()},
        "cold minus warm, median ms": 1e3 * statistics.median(
            one - other for one, other in zip(times["cold"], times["warm"], strict=True)
        ),
        "reading from the store, mean ms": 1e3 * seconds / loads,
    }  # fmt: skip


def check(is_right: bool, seen: object) -> None:
    """Stop where something came out as it must not."""
    if not is_right:
        raise SystemExit(f"not as it should be: {seen}")


EXPERIMENTS: dict[str, Callable[[Path, Path, int], Result]] = {
    f.__name__: f for f in (damaged, failing, slow, disk, updates, isolation, cold)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts here")
    parser.add_argument("--disk", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("ponderttt").setLevel(logging.CRITICAL)  # it says all that is injected
    if options.disk:
        print(json.dumps(on_disk(options.disk[1], options.disk[0])), flush=True)
        os._exit(0)
    known = options.json is not None and options.json.exists()
    results: Result = json.loads(options.json.read_text()) if known else {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as directory:
            scratch, begun = Path(directory), time.monotonic()
            result = EXPERIMENTS[name](make_tiny_llama(scratch / "tiny"), scratch, options.seed)
        took = {"seed": options.seed, "seconds": round(time.monotonic() - begun, 1),
                "load average": round(os.getloadavg()[0], 1)}  # fmt: skip
        results[name] = result | took
        print(name, json.dumps(results[name], indent=2), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
