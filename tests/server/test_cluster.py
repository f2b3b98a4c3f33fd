"""Two replicas under Ray Serve on this machine: one cluster, with API keys, for all tests here.

The tests run in the order in which they stand: the last ones kill and replace replicas.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers import source_text
from tests.server.live import PROMPT

ROOT = Path(__file__).parents[2]
COMMAND = "import typer\nfrom server.cluster_cli import cluster\ntyper.run(cluster)"
TEXT = source_text()
#: What a machine that others keep busy may take for anything here.
_SECONDS = 240.0
KEYS = {"alice": "completions", "bob": "completions", "root": "admin"}


@dataclass
class Cluster:
    """A cluster that is running."""

    url: str
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def client(self, key: str | None = "alice") -> httpx.Client:
        """Somebody with a key."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}-key"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=_SECONDS)

    def replicas(self) -> dict[str, int]:
        """Process of each replica."""
        with self.client("root") as http:
            page = http.get("/metrics").raise_for_status().text
        return {
            sample.labels["replica"]: int(sample.labels["pid"])
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == "ponderttt_cluster_replica"
        }

    def value(self, name: str, **labels: str) -> float:
        """A sample, summed over the replicas."""
        with self.client("root") as http:
            page = http.get("/metrics").raise_for_status().text
        return sum(
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == f"ponderttt_{name}" and sample.labels.items() >= labels.items()
        )

    def wait_for_line(self, text: str, seconds: float = 2 * _SECONDS) -> None:
        """Wait until the command has printed something."""
        until = time.monotonic() + seconds
        while not any(text in line for line in list(self.lines)):
            assert self.process.poll() is None, "".join(self.lines)
            assert time.monotonic() < until, "".join(self.lines)
            time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """`ponderttt cluster` with two replicas of the tiny model."""
    directory = tmp_path_factory.mktemp("cluster")
    keys = directory / "keys.toml"
    keys.write_text(
        "".join(
            f'[keys.{name}]\nsha256 = "{sha256(f"{name}-key".encode()).hexdigest()}"\n'
            f'scopes = ["{scope}"]\n'
            for name, scope in KEYS.items()
        )
    )
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "--model", str(tiny_llama_dir), "--port", "0",
         "--no-measure-costs", "--session-write-delay", "0.1", "--learning-rate", "0.01",
         "--chunk-size", "64", "--gate", "fixed", "--drain-seconds", "10",
         "--session-lease-seconds", "500",
         "--replica-cpus", "0.5", "--log-level", "warning",
         "--api-key-file", str(keys), "--sessions", str(directory / "sessions")],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    running = Cluster("", process)
    assert process.stdout is not None
    out = process.stdout
    reader = threading.Thread(target=lambda: running.lines.extend(out), daemon=True)
    reader.start()
    try:
        running.wait_for_line("documentation http")
        found = re.search(r"http://[\d.:]+", "".join(running.lines))
        assert found is not None
        running.url = found[0]
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(_SECONDS)
        reader.join(10)
        out.close()
    assert code == 0, "".join(running.lines)


def error(answer: httpx.Response) -> dict[str, Any]:
    detail: dict[str, Any] = answer.json()["error"]
    assert set(detail) == {"message", "type", "param", "code"}
    return detail


def replica(answer: httpx.Response) -> str:
    """Which one has answered."""
    return answer.raise_for_status().headers["x-ponderttt-replica"]


def complete(http: httpx.Client, session: str, **fields: Any) -> httpx.Response:
    asked = {"prompt": PROMPT, "max_tokens": 4, "ttt": {"session": session}, **fields}
    return http.post("/v1/completions", json=asked)


def teach(http: httpx.Client, session: str, text: str) -> httpx.Response:
    return http.post(f"/v1/sessions/{session}/adapt", json={"documents": [{"text": text}]})


def saved(http: httpx.Client, session: str) -> dict[str, Any]:
    """A session's state, once all of it is in the store."""
    until = time.monotonic() + _SECONDS
    while True:
        state: dict[str, Any] = http.get(f"/v1/sessions/{session}").raise_for_status().json()
        if state["kept_versions"] and state["kept_versions"][-1] == state["version"]:
            return state
        assert time.monotonic() < until, state
        time.sleep(0.05)


def test_requests_of_a_session_go_to_one_replica_and_sessions_to_both(cluster: Cluster) -> None:
    with cluster.client() as http, ThreadPoolExecutor(8) as pool:
        homes: dict[str, str] = {}
        # Some more of them, where Serve hears late which replica has fewer.
        while len(homes) < 4 or len(set(homes.values())) < 2:
            name = f"repo-{len(homes)}"
            homes[name] = replica(http.post("/v1/sessions", json={"id": name}))
            assert len(homes) < 24, homes
            time.sleep(0.3)
        assert set(homes.values()) == set(cluster.replicas())
        names = list(homes) * 6
        for name, answer in zip(names, pool.map(lambda n: complete(http, n), names), strict=True):
            assert replica(answer) == homes[name]
            assert answer.json()["ttt"]["session"] == name
        for name in homes:
            assert replica(teach(http, name, TEXT[:400])) == homes[name]
            assert saved(http, name)["version"] > 0
            assert replica(complete(http, name)) == homes[name]


def test_sessions_are_listed_forked_and_deleted_through_any_replica(cluster: Cluster) -> None:
    with cluster.client("bob") as http:
        # Nobody else knows of the copies' names: their replica must tell Serve.
        made = http.post("/v1/sessions", json={}).json()["id"]
        teach(http, made, TEXT[:400])
        digest = http.get(f"/v1/sessions/{made}").json()["digest"]
        copies = []
        for _ in range(3):
            copy = http.post(f"/v1/sessions/{made}/fork")
            assert copy.status_code == 201, copy.text
            copies.append(copy.json()["id"])
            state = http.get(f"/v1/sessions/{copies[-1]}")
            assert (state.status_code, state.json()["digest"]) == (200, digest)
        for name in (made, *copies):
            saved(http, name)
        seen: set[str] = set()
        for _ in range(100):
            if len(seen) == 2:
                break
            listed = http.get("/v1/sessions")
            seen.add(replica(listed))
            assert {each["id"] for each in listed.json()["data"]} == {made, *copies}
        assert len(seen) == 2
        assert http.delete(f"/v1/sessions/{made}").status_code == 200
        for _ in range(6):
            listed = http.get("/v1/sessions")
            assert {each["id"] for each in listed.json()["data"]} == set(copies)
            assert http.get(f"/v1/sessions/{made}").status_code == 404
            assert http.delete(f"/v1/sessions/{made}").status_code == 404
        assert http.post("/v1/sessions", json={"id": made}).status_code == 201


def test_answers_are_those_of_one_server(cluster: Cluster) -> None:
    with cluster.client() as http, cluster.client(None) as nobody, cluster.client("root") as root:
        assert nobody.get("/health").json() == {"status": "alive"}
        assert nobody.get("/ready").json() == {"status": "ready", "replicas": 2}
        assert nobody.get("/openapi.json").status_code == 200
        cases = [
            (nobody.get("/v1/models"), 401, None),
            (complete(nobody, "repo-0"), 401, None),
            (http.get("/metrics"), 403, None),
            (http.get("/v1/nothing"), 404, None),
            (http.put("/v1/models"), 405, None),
            (complete(http, "unknown"), 404, "ttt.session"),
            (complete(http, "bob~repo-0"), 404, "ttt.session"),
            (complete(http, "repo-0", max_tokens=-1), 400, "max_tokens"),
            (http.get("/v1/sessions/unknown"), 404, "session"),
            (http.post("/v1/sessions", json={"id": "repo-0"}), 409, "id"),
            (http.post("/v1/sessions", json={"id": "a b"}), 400, "id"),
            (http.post("/v1/completions", content=b"{"), 415, None),
            (http.post("/v1/completions", content=b" " * (9 << 20)), 413, None),
        ]
        for answer, status, param in cases:
            assert (answer.status_code, error(answer)["param"]) == (status, param), answer.text
        asked = {"X-Request-Id": "mine"}
        answer = http.get("/v1/models", headers=asked)
        assert answer.headers.get_list("x-request-id") == ["mine"]
        # The same name of another key is another session; an administrator sees both.
        with cluster.client("bob") as bob:
            assert bob.get("/v1/sessions/repo-0").status_code == 404
        assert root.get("/v1/sessions/alice~repo-0").json()["owner"] == "alice"
    assert cluster.value("requests_total", outcome="length") > 0


def test_stream_passes_through_and_ends_with_its_client(cluster: Cluster) -> None:
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="alice-key", max_retries=0)
    with client:
        stream = client.completions.create(
            model=client.models.list().data[0].id, prompt=PROMPT, max_tokens=16, stream=True,
            extra_body={"ttt": {"session": "repo-1"}, "ignore_eos": True},
        )  # fmt: skip
        events = list(stream)
    assert len(events) > 4
    assert events[-1].choices[0].finish_reason == "length"
    asked = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}

    def leave_a_stream(patience: float) -> None:
        with cluster.client() as http, http.stream("POST", "/v1/completions", json=asked) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            next(answer.iter_lines())

    def leave_an_answer(patience: float) -> None:
        with cluster.client() as http, suppress(httpx.ReadTimeout):
            http.post("/v1/completions", json={**asked, "stream": False}, timeout=patience)

    for leave in (leave_a_stream, leave_an_answer):
        assert is_aborted(cluster, leave), leave.__name__


def is_aborted(cluster: Cluster, leave: Callable[[float], None]) -> bool:
    """Whether a client's leaving ends its request; it may leave before that has begun, or after."""
    before = cluster.value("requests_total", outcome="abort")
    for patience in (0.3, 0.5, 0.2, 1.0, 0.1, 2.0, 4.0):
        leave(patience)
        until = time.monotonic() + 5
        while time.monotonic() < until:
            if cluster.value("requests_total", outcome="abort") > before:
                return True
            time.sleep(0.1)
    return False


class Load:
    """Clients that go on learning and asking, each in a session of its own."""

    def __init__(self, cluster: Cluster, names: list[str]) -> None:
        self.answers: list[tuple[str, httpx.Response]] = []
        self.cut_off = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(cluster, name)) for name in names]

    def _run(self, cluster: Cluster, name: str) -> None:
        with cluster.client() as http:
            for part in range(10_000):
                if self._stop.is_set():
                    return
                place = 200 * part % (len(TEXT) - 200)
                try:
                    self.answers.append((name, teach(http, name, TEXT[place : place + 200])))
                    self.answers.append((name, complete(http, name)))
                except httpx.RemoteProtocolError:
                    self.cut_off += 1
                time.sleep(0.1)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def versions(self, name: str) -> list[int]:
        """In the order of the answers."""
        return [
            answer.json()["version_after"]
            for each, answer in self.answers
            if each == name and answer.request.url.path.endswith("/adapt")
        ]


def test_session_goes_on_elsewhere_when_its_replica_is_killed(cluster: Cluster) -> None:
    names = [f"repo-{number}" for number in range(4)]
    with cluster.client() as http:
        quiet = saved(http, "repo-0")
        home = replica(http.get("/v1/sessions/repo-0"))
        with Load(cluster, names[1:]) as load:
            time.sleep(1)
            os.kill(cluster.replicas()[home], signal.SIGKILL)
            # Before a lease would end: on a local disk the lock ends with the process.
            after = http.get("/v1/sessions/repo-0")
            time.sleep(1)
        assert replica(after) != home
        assert (after.json()["version"], after.json()["digest"]) == (
            quiet["version"],
            quiet["digest"],
        )
    assert {answer.status_code for _, answer in load.answers} == {200}
    # Nobody is cut off but who was just being answered.
    assert load.cut_off <= len(names)
    for name in names[1:]:
        versions = load.versions(name)
        # What had not been committed is learned again under the numbers it had, at most.
        assert versions[-1] > versions[0]
    assert cluster.value("cluster_repeats_total") > 0


def test_rolling_restart_loses_no_session_and_no_request(cluster: Cluster) -> None:
    names = [f"repo-{number}" for number in range(4)]
    until = time.monotonic() + _SECONDS
    while len(cluster.replicas()) < 2:  # the one that was killed is replaced
        assert time.monotonic() < until
        time.sleep(0.2)
    before = cluster.replicas()
    with cluster.client() as http:
        quiet = saved(http, "repo-0")
        with Load(cluster, names[1:]) as load:
            cluster.process.send_signal(signal.SIGHUP)
            cluster.wait_for_line("all replicas are new")
        after = saved(http, "repo-0")
        kept = {name: http.get(f"/v1/sessions/{name}").json()["version"] for name in names}
    assert not set(before) & set(cluster.replicas())
    assert (after["version"], after["digest"]) == (quiet["version"], quiet["digest"])
    assert load.cut_off == 0
    assert {answer.status_code for _, answer in load.answers} == {200}, json.dumps(
        [answer.text for _, answer in load.answers if answer.status_code != 200]
    )
    for name in names[1:]:
        versions = load.versions(name)
        assert versions == sorted(versions)
        assert kept[name] == versions[-1] > 0
