"""What a cluster is made of, one part at a time: no Ray, no model."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from ponderttt.errors import InvalidRequestError
from server.cluster_cli import deploy_there
from server.cluster_failure import start_failure
from server.cluster_ingress import Target, target_of
from server.cluster_metrics import IngressMetrics
from server.cluster_replica import Call, Page, exchange
from server.cluster_settings import ClusterSettings, check_cluster, portable
from server.keys import ApiKey, session_name

SCOPE = {"type": "http", "method": "GET", "path": "/", "headers": []}


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("method", "path", "text", "expected"),
    [
        ("POST", "/v1/completions", body(ttt={"session": "repo"}), Target("repo")),
        ("POST", "/v1/chat/completions", body(ttt={"session": "repo"}), Target("repo")),
        ("POST", "/v1/completions", body(prompt="x"), Target()),
        ("POST", "/v1/completions", body(ttt=None), Target()),
        ("POST", "/v1/completions", body(ttt={"session": 7}), Target()),
        ("POST", "/v1/completions", body(ttt="repo"), Target()),
        ("POST", "/v1/completions", b'["ttt"]', Target()),
        ("POST", "/v1/completions", b'{"ttt": NaN', Target()),
        ("POST", "/v1/completions", b"\xff", Target()),
        ("POST", "/v1/completions", body(a="x" * 70_000, ttt={"session": "r"}), Target("r")),
        ("GET", "/v1/sessions", b"", Target()),
        ("POST", "/v1/sessions", b"", Target(None, is_new=True, repeatable=False)),
        ("POST", "/v1/sessions", body(id="r"), Target("r", is_new=True, repeatable=False)),
        ("GET", "/v1/sessions/repo", b"", Target("repo")),
        ("DELETE", "/v1/sessions/repo", b"", Target("repo")),
        ("POST", "/v1/sessions/repo/adapt", b"{}", Target("repo")),
        ("GET", "/v1/sessions/alice~repo/adapter", b"", Target("alice~repo")),
        ("POST", "/v1/sessions/repo/fork", body(id="r"), Target("repo", repeatable=False)),
        ("POST", "/v1/sessions/repo/rollback", b"", Target("repo", repeatable=False)),
        ("POST", "/v1/sessions/repo/snapshot", b"", Target("repo", repeatable=False)),
        ("POST", "/v1/sessions/a/b/c", b"", Target()),
        ("POST", "/tokenize", body(ttt={"session": "repo"}), Target()),
        ("GET", "/v1/models", b"", Target()),
    ],
)
async def test_session_is_found_in_path_or_body(
    method: str, path: str, text: bytes, expected: Target
) -> None:
    assert await target_of(method, path, text) == expected


@pytest.mark.parametrize(
    ("key_id", "scope", "name", "expected"),
    [
        (None, None, "repo", "repo"),
        (None, None, "alice~repo", None),
        ("alice", "completions", "repo", "alice~repo"),
        ("alice", "completions", "bob~repo", None),
        ("root", "admin", "bob~repo", "bob~repo"),
        ("root", "admin", "~repo", "repo"),
    ],
)
def test_sessions_of_two_keys_never_share_a_name(
    key_id: str | None, scope: Any, name: str, expected: str | None
) -> None:
    key = None if key_id is None else ApiKey(key_id, b"", frozenset([scope]))
    assert session_name(key, name) == expected


async def test_exchange_passes_body_in_and_messages_out_in_order() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(200):  # more than may wait
            await send({"type": "http.response.body", "body": b"%d," % number, "more_body": True})
        await send({"type": "http.response.body", "body": message["body"]})

    batches = [batch async for batch in exchange(app, Call(SCOPE, b"end", None))]
    messages = [message for batch in batches for message in batch]
    assert messages[0]["type"] == "http.response.start"
    text = b"".join(message["body"] for message in messages[1:])
    assert text == b"".join(b"%d," % number for number in range(200)) + b"end"


async def test_closing_an_exchange_is_the_clients_disconnect() -> None:
    heard: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        heard.append(await receive())
        for _ in range(200):  # what nobody reads does not keep it
            await send({"type": "http.response.body", "body": b"", "more_body": True})
        heard.append({"type": "ended"})

    answer = exchange(app, Call(SCOPE, b"", None))
    assert (await anext(answer))[0]["type"] == "http.response.start"
    await asyncio.wait_for(answer.aclose(), 5)
    assert [message["type"] for message in heard] == ["http.disconnect", "ended"]


async def test_exchange_ends_where_the_application_fails(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        raise RuntimeError("broken")

    batches = [batch async for batch in exchange(app, Call(SCOPE, b"", None))]
    assert [message["status"] for batch in batches for message in batch] == [500]
    assert "broken" in caplog.text


def test_metrics_of_replicas_are_told_apart() -> None:
    text = (
        "# HELP ponderttt_requests_total Requests ended.\n# TYPE ponderttt_requests_total counter\n"
        'ponderttt_requests_total{outcome="ok"} %d\n'
        "# HELP ponderttt_seconds Time.\n# TYPE ponderttt_seconds histogram\n"
        'ponderttt_seconds_bucket{le="1.0"} 1\nponderttt_seconds_bucket{le="+Inf"} 2\n'
        "ponderttt_seconds_count 2\nponderttt_seconds_sum 3\n"
    )
    page = IngressMetrics().page([Page("a", "h1", 1, text % 5), Page("b", "h2", 2, text % 7)])
    lines = page.decode().splitlines()
    assert "ponderttt_cluster_replicas 2.0" in lines
    assert 'ponderttt_cluster_replica{host="h2",pid="2",replica="b"} 1.0' in lines
    assert 'ponderttt_requests_total{outcome="ok",replica="a"} 5.0' in lines
    assert 'ponderttt_requests_total{outcome="ok",replica="b"} 7.0' in lines
    assert 'ponderttt_seconds_bucket{le="+Inf",replica="a"} 2.0' in lines
    assert sum(line.startswith("# TYPE ponderttt_requests_total") for line in lines) == 1


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (
            "ponderttt.engine.vllm.check.VllmMismatchError: no LoRA: start\n  it",
            "no LoRA: start it",
        ),
        ("ponderttt.errors.InvalidRequestError: budget: 0 is low", "budget: 0 is low"),
        ("RuntimeError: no room", "RuntimeError: no room"),
        (
            "botocore.exceptions.NoCredentialsError: none",
            "botocore.exceptions.NoCredentialsError: none",
        ),
    ],
)
def test_replica_that_does_not_start_is_told_in_its_own_words(end: str, expected: str) -> None:
    trace = (
        "The deployment failed to start 3 times in a row. Error:\n\x1b[36mray::Replica\x1b[39m\n"
        '  File "a.py", line 1, in f\nhttpx.ConnectError: All attempts failed\n\n'
        "The above exception was the direct cause of the following exception:\n\n"
        f'Traceback:\n  File "b.py", line 2, in g\n    raise Error(x: y)\n{end}'
    )
    failed = SimpleNamespace(message=trace)
    fine = SimpleNamespace(message="")
    application = SimpleNamespace(
        message="Failed to update", deployments={"Ingress": fine, "Replica": failed}
    )
    error = start_failure(application)
    assert str(error) == f"the cluster does not start: Replica: {expected}"
    application.deployments = {}
    assert str(start_failure(application)).endswith("start: Failed to update")


@pytest.mark.parametrize(
    ("given", "field", "remedy"),
    [
        ({"sessions": "memory"}, "sessions", "--sessions s3://"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas", "lower --replicas"),
        ({"device": "cuda"}, "replica_gpus", "--replica-gpus 1"),
        ({"device": "cuda:1", "replica_gpus": 1}, "device", "--device cuda"),
    ],
)
def test_settings_that_can_not_work_are_refused(
    given: dict[str, Any], field: str, remedy: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field}: .*{remedy}"):
        check_cluster(ClusterSettings(**given))


@pytest.mark.parametrize("address", ["127.0.0.1:9", "[::1]:9", "local", "host:port"])
def test_ray_address_where_nobody_listens_is_refused_at_once(address: str) -> None:
    begun = time.monotonic()
    with pytest.raises(InvalidRequestError, match=f"no Ray cluster at '{re.escape(address)}'"):
        deploy_there(ClusterSettings(ray_address=address))
    assert time.monotonic() - begun < 20  # Ray tries for minutes


def test_settings_reach_processes_elsewhere_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys.toml").touch()
    (tmp_path / "model").mkdir()
    settings = ClusterSettings(api_key_file=Path("keys.toml"), sessions="place", model="model")
    # Another process has another environment; what was not given must not come from there.
    values = portable(settings)
    monkeypatch.setenv("PONDERTTT_BUDGET", "9")
    there = ClusterSettings(**values)
    assert there.api_key_file == tmp_path / "keys.toml"
    assert (there.sessions, there.model) == (str(tmp_path / "place"), str(tmp_path / "model"))
    assert there.budget == settings.budget
    for kept in ({"sessions": "s3://bucket/x"}, {"model": "smollm2-135m"}, {"sessions": None}):
        assert portable(ClusterSettings(**kept)).items() >= kept.items()
