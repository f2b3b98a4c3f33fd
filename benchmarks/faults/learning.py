"""Updates that fail, a secret that is learned, a session that is cold; smollm2-135m, over HTTP."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.faults.check import Result, check
from ponderttt.adaptation import update
from ponderttt.engine.observer import StepRecord
from ponderttt.fast_weights.optimizer import adam_rows
from ponderttt.models import store as models
from tests.helpers import source_text
from tests.ponderttt.sessions.stores import same
from tests.server import test_isolation as isolation_tests
from tests.server.live import Live, live_server
from tests.server.test_auth import bearer_of

MODEL = "smollm2-135m"
TEXT = source_text()


def bad_step(kind: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    """An optimiser step that goes wrong, after a real forward and backward."""
    right = adam_rows

    def step(weights: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        if kind == "out of memory":
            raise torch.OutOfMemoryError("no room")
        new, first, second = right(weights, *rest)
        factor = {"NaN": math.nan, "exploding": 1e6, "climbing": -40.0}[kind]
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
    shared: Counter[str] = Counter()

    def note(record: StepRecord) -> None:
        owners = {tag.owner.partition("~")[0] for tag in record.tags if tag.owner}
        if {"alice", "bob"} <= owners:
            shared[record.kind] += 1

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
            live.http.timeout = 600.0  # Bob's documents take their time
            for shift in range(8 if present else 0):
                tests.teach(live, "bob", f"{'#' * shift}\n{tests.SECRET * 6}", "UPDATE_4")
            means["Bob" if present else "Bob, before"] = tests.mean_score(live, "bob", tests.SECRET)
            with patch.object(live.core.observer, "step", note):
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
    check(shared.total() > 0, "no phase was shared, so nothing was tried")
    check(means["Bob"] > means["Alice, Bob learning beside"] + 1.0, means)
    return {
        "model": MODEL,
        "requests of Bob meanwhile": asked.total(),
        "phases that Alice and Bob shared": dict(shared),
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
            while not live.core.sessions.ahead.is_cold("repo"):
                check(time.monotonic() < until, "the session stays warm")
                time.sleep(0.05)
            for known in times.values():
                begun = time.perf_counter()
                live.http.post("/v1/completions", json=body).raise_for_status()
                if number:  # the first one warms up
                    known.append(time.perf_counter() - begun)
        stats = live.core.sessions.store_stats()
        assert stats is not None
        loads, seconds = stats.loads, stats.load_seconds
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
