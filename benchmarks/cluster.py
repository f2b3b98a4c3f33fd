"""A cluster on this machine: what a session lives through, and what replicas bring.

    python -m benchmarks.cluster --model smollm2-135m --json benchmarks/results/cluster.json

Starts `ponderttt cluster` with two replicas of one thread and, under load of several sessions,
looks where each session's requests go, kills (SIGKILL) the replica of one of them, and restarts
the replicas one by one (SIGHUP). Then, with a fresh server each time, it has `ponderttt bench load`
measure the throughput of one plain server and of clusters with one and two replicas.
`--only` names parts: sessions, throughput.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers import source_text

ROOT = Path(__file__).resolve().parent.parent
TEXT = source_text()
PROMPT = "def parse(text, separator=','):\n    parts = text.split(separator)\n    return"
_START_SECONDS = 300
# Characters taught at a time: a chunk of 64 tokens or two.
_LESSON = 400
_LOAD = "import typer\nfrom clients.load.cli import load\ntyper.run(load)"
_NAMES = [f"repo-{number}" for number in range(4)]


@dataclass
class Server:
    """A server or cluster that is running, and what it has printed."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    url: str = ""

    def wait_for(self, text: str) -> None:
        """Wait for a line."""
        until = time.monotonic() + _START_SECONDS
        while not any(text in line for line in list(self.lines)):
            if self.process.poll() is not None or time.monotonic() > until:
                sys.exit("".join(self.lines))
            time.sleep(0.05)

    def replicas(self) -> dict[str, int]:
        """Process of each replica."""
        page = httpx.get(f"{self.url}/metrics", timeout=60).raise_for_status().text
        return {
            sample.labels["replica"]: int(sample.labels["pid"])
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == "ponderttt_cluster_replica"
        }


@contextmanager
def running(command: str, model: str, store: str, *options: str) -> Iterator[Server]:
    """`ponderttt serve` or `ponderttt cluster` on a free port."""
    module = {"serve": "server.cli", "cluster": "server.cluster_cli"}[command]
    code = f"import typer\nfrom {module} import {command}\ntyper.run({command})"
    process = subprocess.Popen(
        [sys.executable, "-c", code,
         "--model", model, "--port", "0", "--sessions", store, "--no-measure-costs",
         "--log-level", "warning", *options],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    out, server = process.stdout, Server(process)
    threading.Thread(target=lambda: server.lines.extend(out), daemon=True).start()
    try:
        server.wait_for("documentation http")
        found = re.search(r"http://[\d.:]+", "".join(server.lines))
        assert found is not None
        server.url = found[0]
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


@dataclass
class Step:
    """One answer of the load: which session, when, by whom, and its version afterwards."""

    session: str
    ended: float
    seconds: float
    status: int
    replica: str | None
    version: int | None


class Load:
    """One client per session, which teaches it and asks it in turns until told to stop."""

    def __init__(self, server: Server, names: list[str]) -> None:
        self.steps: list[Step] = []
        self._server = server
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(name,)) for name in names]

    def _run(self, name: str) -> None:
        with httpx.Client(base_url=self._server.url, timeout=300) as http:
            part = 0
            while not self._stop.is_set():
                place = (_LESSON * part) % (len(TEXT) - _LESSON)
                documents = [{"text": TEXT[place : place + _LESSON]}]
                self._ask(http, name, f"/v1/sessions/{name}/adapt", {"documents": documents})
                asked = {"prompt": PROMPT, "max_tokens": 8, "ttt": {"session": name, "gate": "off"}}
                self._ask(http, name, "/v1/completions", asked)
                part += 1

    def _ask(self, http: httpx.Client, name: str, path: str, body: dict[str, Any]) -> None:
        begun = time.monotonic()
        answer = http.post(path, json=body)
        now = time.monotonic()
        found = answer.json()
        version = found.get("version_after", (found.get("ttt") or {}).get("version_after"))
        by = answer.headers.get("x-ponderttt-replica")
        self.steps.append(Step(name, now, now - begun, answer.status_code, by, version))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def summary(self) -> dict[str, Any]:
        """Answers by status, replicas per session, and whether versions ever went back."""
        by_session = {n: [s for s in self.steps if s.session == n] for n in _NAMES}
        return {
            "answers": len(self.steps),
            "by_status": dict(Counter(str(step.status) for step in self.steps)),
            "replicas_per_session": {n: len({s.replica for s in by_session[n]}) for n in _NAMES},
            "sessions_whose_version_went_back": sum(
                any(b < a for a, b in itertools.pairwise(found))
                for found in (
                    [s.version for s in steps if s.version is not None]
                    for steps in by_session.values()
                )
            ),
            "longest_answer_seconds": max(step.seconds for step in self.steps),
        }


def state(server: Server, name: str) -> tuple[dict[str, Any], str]:
    """A session, and the replica that has it."""
    answer = httpx.get(f"{server.url}/v1/sessions/{name}", timeout=120).raise_for_status()
    return answer.json(), answer.headers["x-ponderttt-replica"]


def saved(server: Server, name: str) -> tuple[dict[str, Any], str]:
    """The same, once all of it is in the store."""
    until = time.monotonic() + 60
    while True:
        found, replica = state(server, name)
        if found["kept_versions"] and found["kept_versions"][-1] == found["version"]:
            return found, replica
        if time.monotonic() > until:
            sys.exit(f"{name} is not saved: {found}")
        time.sleep(0.1)


def committed(store: str, name: str) -> int:
    """The newest version of a session in the store."""
    found = (int(path.parent.name[1:]) for path in Path(store, name).glob("v*/session.json"))
    return max(found)


def sessions(model: str, seconds: float, place: str) -> dict[str, Any]:
    """Affinity, a kill in mid-load, and a rolling restart."""
    options = ("--replicas", "2", "--threads", "1", "--gate", "fixed", "--chunk-size", "64",
               "--session-write-delay", "0.5")  # fmt: skip
    with running("cluster", model, place, *options) as server:
        for name in _NAMES:
            httpx.post(f"{server.url}/v1/sessions", json={"id": name}).raise_for_status()
            time.sleep(1)  # until Serve knows which replica has fewer
        with Load(server, _NAMES) as load:
            time.sleep(seconds)
        affinity = load.summary() | {
            "replicas": len(server.replicas()),
            "sessions_per_replica": list(
                Counter(state(server, name)[1] for name in _NAMES).values()
            ),
        }
        return {
            "affinity": affinity,
            "kill": _kill(server, seconds, place),
            "rolling_restart": _roll(server),
        }


def _kill(server: Server, seconds: float, place: str) -> dict[str, Any]:
    # One session is idle, at the replica that has most.
    homes = {name: state(server, name)[1] for name in _NAMES}
    home = Counter(homes.values()).most_common(1)[0][0]
    quiet = next(name for name in _NAMES if homes[name] == home)
    busy = [name for name in _NAMES if name != quiet]
    before, _ = saved(server, quiet)
    with Load(server, busy) as load:
        time.sleep(seconds / 2)
        victims = [name for name in busy if homes[name] == home]
        os.kill(server.replicas()[home], signal.SIGKILL)
        killed = time.monotonic()
        on_disk = {name: committed(place, name) for name in victims}
        after, elsewhere = state(server, quiet)
        took = time.monotonic() - killed
        while len(server.replicas()) < 2:
            time.sleep(0.2)
        restored = time.monotonic()
        time.sleep(max(0.0, killed + seconds / 2 - restored))
    gaps = {}
    for name in victims:
        steps = [s for s in load.steps if s.session == name]
        told = max((s.version or 0 for s in steps if s.ended <= killed), default=0)
        first = next(s for s in steps if s.ended > killed and s.status == 200)
        gaps[name] = {
            "seconds_to_first_answer": first.ended - killed,
            "last_version_answered": told,
            "last_version_committed": on_disk[name],
            "first_version_answered_afterwards": first.version,
        }
    return load.summary() | {
        "idle_session": {
            "same_version": after["version"] == before["version"],
            "same_digest": after["digest"] == before["digest"],
            "on_another_replica": elsewhere != home,
            "seconds_to_first_answer": took,
        },
        "sessions_that_were_there": gaps,
        "seconds_to_two_replicas": restored - killed,
    }


def _roll(server: Server) -> dict[str, Any]:
    before, _ = saved(server, _NAMES[0])
    old = server.replicas()
    begun = time.monotonic()
    with Load(server, _NAMES[1:]) as load:
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("all replicas are new")
        took = time.monotonic() - begun
    after, _ = saved(server, _NAMES[0])
    last = {
        name: max(s.version or 0 for s in load.steps if s.session == name) for name in _NAMES[1:]
    }
    return load.summary() | {
        "seconds": took,
        "replicas_replaced": len(set(old) - set(server.replicas())),
        "idle_session_same_digest": after["digest"] == before["digest"],
        "sessions_at_their_last_version": sum(
            saved(server, name)[0]["version"] == version for name, version in last.items()
        ),
    }


def throughput(model: str, users: int, requests: int, gate: str) -> dict[str, Any]:
    """Answers and tokens per second of one server and of clusters, the same load each time."""
    setups = {
        "server, 1 thread": ("serve", "--threads", "1"),
        "1 replica, 1 thread": ("cluster", "--replicas", "1", "--threads", "1"),
        "1 replica, 2 threads": ("cluster", "--replicas", "1", "--threads", "2"),
        "2 replicas, 1 thread each": ("cluster", "--replicas", "2", "--threads", "1"),
    }
    found: dict[str, Any] = {}
    for name, (command, *options) in setups.items():
        with (
            tempfile.TemporaryDirectory() as store,
            running(command, model, store, *options) as server,
        ):
            found[name] = _measured(server.url, users, requests, gate)
        print(f"{name}: {found[name]['answers_per_second']:.2f} answers/s", flush=True)

    def ratio(one: str, other: str) -> float:
        return float(found[one]["answers_per_second"] / found[other]["answers_per_second"])

    return {
        "users": users,
        "requests": requests,
        "gate": gate,
        "prompt_tokens": 128,
        "output_tokens": 16,
        "load_average": os.getloadavg(),
        "setups": found,
        "ratios": {
            "two_replicas_vs_one_of_1_thread": ratio(
                "2 replicas, 1 thread each", "1 replica, 1 thread"
            ),
            "two_replicas_vs_one_of_2_threads": ratio(
                "2 replicas, 1 thread each", "1 replica, 2 threads"
            ),
            "cluster_of_one_vs_server_1_thread": ratio("1 replica, 1 thread", "server, 1 thread"),
        },
    }


def _measured(url: str, users: int, requests: int, gate: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        summary = Path(place, "summary.json")
        subprocess.run(
            [sys.executable, "-c", _LOAD,
             "--base-url", url, "--concurrency", str(users), "--requests", str(requests),
             "--warmup", str(users), "--prompt-tokens", "128", "--output-tokens", "16",
             "--ttt", "session=load-{n}", "--ttt", f"gate={gate}", "--body", "ignore_eos=true",
             "--timeout", "600", "--quiet", "--output", str(Path(place, "load.jsonl")),
             "--json", str(summary)],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        figures = json.loads(summary.read_text())["summary"]
    kept = ("ok", "failed", "rejected", "answers_per_second", "prompt_tokens_per_second",
            "completion_tokens_per_second", "ttft", "tpot")  # fmt: skip
    return {name: figures[name] for name in kept if name in figures}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--only", choices=("sessions", "throughput"))
    parser.add_argument("--seconds", type=float, default=20, help="of load before and after a kill")
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--gate", default="threshold")
    parser.add_argument("--json", type=Path, help="file for the figures; keeps what is not run")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    if given.json and given.json.exists():
        found = json.loads(given.json.read_text())
    found |= {"model": given.model, "cores": os.cpu_count(), "machine": platform.machine()}
    if given.only != "throughput":
        with tempfile.TemporaryDirectory() as place:
            found["sessions"] = sessions(given.model, given.seconds, place)
    if given.only != "sessions":
        found["throughput"] = throughput(given.model, given.users, given.requests, given.gate)
    print(json.dumps(found, indent=2))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
