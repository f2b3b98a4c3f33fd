"""The way into a cluster, with replicas that are made up: no Ray processes, no model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayActorError

from server.cluster_ingress import create_ingress
from server.cluster_replica import Batch, Call, Elsewhere, Page
from server.cluster_settings import ClusterSettings

ASKED = {"prompt": "x", "ttt": {"session": "repo"}}
Step = Batch | Elsewhere | Exception


def start(status: int = 200, content_type: str = "application/json") -> dict[str, Any]:
    headers = [(b"content-type", content_type.encode()), (b"x-ponderttt-replica", b"one")]
    return {"type": "http.response.start", "status": status, "headers": headers}


def piece(text: str, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


ANSWER: list[Step] = [[start(), piece("{}")]]
HERE = Elsewhere("session 'repo' is in use by another server")


class Stream:
    """What Serve gives for a request: steps that come one by one."""

    def __init__(self, steps: list[Step]) -> None:
        self._steps = iter(steps)
        self.cancelled = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Batch | Elsewhere:
        step = next(self._steps, None)
        if step is None:
            raise StopAsyncIteration
        if isinstance(step, Exception):
            raise step
        return step

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Replicas:
    """Serve's handle: attempt after attempt gets the next script, the last one for ever."""

    scripts: list[list[Step]]
    calls: list[Call] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    ready: list[Any] = field(default_factory=lambda: [True, False, True])

    def options(self, *, stream: bool, multiplexed_model_id: str) -> Replicas:
        assert stream
        self.models.append(multiplexed_model_id)
        return self

    @property
    def answer(self) -> Replicas:
        return self

    def remote(self, call: Call) -> Stream:
        self.calls.append(call)
        return Stream(self.scripts.pop(0) if len(self.scripts) > 1 else list(self.scripts[0]))

    def broadcast(self, method: str) -> Replicas:
        pages = [Page("one", "h", 1, ""), RuntimeError("has died")]
        self.found = {"ready": self.ready, "metrics": pages}[method]
        return self

    async def results_async(self, **options: Any) -> list[Any]:
        return self.found


@asynccontextmanager
async def client_of(replicas: Replicas, **given: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_ingress(ClusterSettings(**given), replicas)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long."""
    monkeypatch.setattr("server.cluster_ingress._FIRST_PAUSE", 0.001)


async def repeats(client: httpx.AsyncClient) -> dict[str, float]:
    page = (await client.get("/metrics")).text
    return {
        sample.labels["reason"]: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "ponderttt_cluster_repeats_total"
    }


@pytest.mark.usefixtures("quick")
async def test_request_is_sent_again_until_the_session_is_where_it_arrives() -> None:
    replicas = Replicas([[HERE], [HERE], ANSWER])
    async with client_of(replicas) as client:
        answer = await client.post("/v1/completions", json=ASKED)
        assert (answer.status_code, answer.text) == (200, "{}")
        assert answer.headers["x-ponderttt-replica"] == "one"
        assert await repeats(client) == {"elsewhere": 2}
    assert replicas.models == ["repo"] * 3
    assert {call.session for call in replicas.calls} == {"repo"}
    waited = [call.waited for call in replicas.calls]
    assert waited == sorted(waited)
    assert waited[-1] > waited[0]


@pytest.mark.usefixtures("quick")
async def test_session_that_stays_elsewhere_is_409_in_the_end() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClusterSettings, "patience_seconds", 0.05)
        async with client_of(Replicas([[HERE]])) as client:
            answer = await client.post("/v1/completions", json=ASKED)
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "session_elsewhere"
    assert ClusterSettings(session_lease_seconds=60, drain_seconds=9).patience_seconds > 60
    assert ClusterSettings(session_lease_seconds=6, drain_seconds=90).patience_seconds > 90


async def test_request_of_a_replica_that_died_is_sent_again_once() -> None:
    replicas = Replicas([[RayActorError()], ANSWER])
    async with client_of(replicas) as client:
        assert (await client.post("/v1/completions", json=ASKED)).status_code == 200
        assert await repeats(client) == {"died": 1}
    poison = Replicas([[RayActorError()]])
    async with client_of(poison) as client:
        answer = await client.post("/v1/completions", json=ASKED)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert len(poison.calls) == 2


@pytest.mark.parametrize("path", ["/v1/sessions", "/v1/sessions/a/fork", "/v1/sessions/a/rollback"])
async def test_what_must_not_be_done_twice_is_not_sent_again(path: str) -> None:
    replicas = Replicas([[RayActorError()]])
    async with client_of(replicas) as client:
        answer = await client.post(path, json={})
    assert answer.status_code == 503
    assert "see whether it did" in answer.json()["error"]["message"]
    assert len(replicas.calls) == 1


async def test_stream_of_a_replica_that_dies_ends_with_an_error_event() -> None:
    head = start(content_type="text/event-stream; charset=utf-8")
    script: list[Step] = [[head, piece("data: 1\n\n", more=True)], RayActorError()]
    async with client_of(Replicas([script])) as client:
        answer = await client.post("/v1/completions", json=ASKED)
    assert answer.text.startswith("data: 1\n\nevent: error\ndata: ")
    event = json.loads(answer.text.rsplit("data: ", 1)[1])
    assert event["error"]["code"] == "unavailable"


async def test_answer_that_is_no_stream_is_cut_off_when_its_replica_dies() -> None:
    script: list[Step] = [[start(), piece("{", more=True)], RayActorError()]
    async with client_of(Replicas([script])) as client:
        with pytest.raises(RayActorError):
            await client.post("/v1/completions", json=ASKED)


async def test_new_session_is_sent_by_its_name_but_not_looked_for() -> None:
    replicas = Replicas([ANSWER])
    async with client_of(replicas) as client:
        await client.post("/v1/sessions", json={"id": "repo"})
        await client.post("/v1/sessions", json={})
        await client.post("/v1/completions", json={"prompt": "x"})
        await client.post("/v1/completions", json={"prompt": "x", "ttt": {"session": "a/b"}})
    assert replicas.models == ["repo", "", "", ""]
    assert [call.session for call in replicas.calls] == [None] * 4


async def test_keys_are_asked_for_at_the_door_and_name_the_session(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    digest = sha256(b"secret").hexdigest()
    keys.write_text(f'[keys.alice]\nsha256 = "{digest}"\nscopes = ["completions"]\n')
    replicas = Replicas([ANSWER])
    async with client_of(replicas, api_key_file=keys, max_body_bytes=1024) as client:
        assert (await client.post("/v1/completions", json=ASKED)).status_code == 401
        assert (await client.get("/ready")).status_code == 200
        client.headers["Authorization"] = "Bearer secret"
        assert (await client.get("/metrics")).status_code == 403
        large = await client.post("/v1/completions", json={"prompt": "x" * 2000})
        assert large.status_code == 413
        assert replicas.calls == []
        assert (await client.post("/v1/completions", json=ASKED)).status_code == 200
    assert replicas.models == ["alice~repo"]
    sent = dict(replicas.calls[0].scope["headers"])
    assert sent[b"authorization"] == b"Bearer secret"
    assert len(sent[b"x-request-id"]) == 32


async def test_pages_of_other_sites_are_kept_out_where_there_are_no_keys() -> None:
    replicas = Replicas([ANSWER])
    async with client_of(replicas) as client:
        for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
            assert (await client.get("/ready", headers=headers)).status_code == 403
            assert (await client.post("/v1/completions", headers=headers)).status_code == 403
    assert replicas.calls == []


@pytest.mark.parametrize(("ready", "status"), [([True, False], 200), ([False], 503), ([], 503)])
async def test_cluster_is_ready_while_one_replica_is(ready: list[bool], status: int) -> None:
    async with client_of(Replicas([ANSWER], ready=ready)) as client:
        answer = await client.get("/ready")
    assert answer.status_code == status
    if status == 200:
        assert answer.json() == {"status": "ready", "replicas": 1}
    else:
        assert answer.json()["error"]["code"] == "unavailable"


async def test_replica_that_does_not_answer_is_left_out_of_the_metrics() -> None:
    async with client_of(Replicas([ANSWER])) as client:
        page = (await client.get("/metrics")).text
    assert "ponderttt_cluster_replicas 1.0" in page
