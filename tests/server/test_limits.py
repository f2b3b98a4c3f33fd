"""Queues, disconnects, and stopping."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from httpx import ASGITransport

from ponderttt.engine.async_engine import AsyncEngine
from ponderttt.engine.config import EngineConfig
from ponderttt.engine.loading import load_core
from server.app import create_app
from server.settings import Settings
from tests.server.live import PROMPT, Live, live_server

LONG: dict[str, Any] = {
    "prompt": PROMPT, "max_tokens": 440, "ignore_eos": True, "ttt": {"gate": "off"},
}  # fmt: skip


@pytest.fixture(scope="module")
def narrow(tiny_llama_dir: Path) -> Iterator[Live]:
    """A server that runs one sequence and lets one request wait."""
    with live_server(tiny_llama_dir, max_num_seqs=1, max_waiting=1, max_sessions=2) as server:
        yield server


@pytest.fixture
def slow(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a token of `live` take at least 10 ms, so that there is time to go away."""
    _slow_down(live, monkeypatch)


def _slow_down(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = live.core.model.logits

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return fast(hidden)

    monkeypatch.setattr(live.core.model, "logits", logits)


@pytest.mark.usefixtures("slow")
def test_stream_whose_client_goes_away_is_aborted_while_others_are_served(live: Live) -> None:
    aborted = live.value("requests_total", outcome="abort")
    with live.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        live.wait_for("num_requests_running", 1)
        other = live.openai.completions.create(model=live.model, prompt=PROMPT, max_tokens=2)
        assert other.usage is not None
        assert other.usage.completion_tokens == 2
    live.wait_for("requests_total", aborted + 1, outcome="abort")
    live.wait_for("num_requests_running", 0)
    assert live.value("kv_cache_usage_perc") == 0


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("prompts", [1, 3])
def test_plain_request_whose_client_goes_away_is_aborted(live: Live, prompts: int) -> None:
    aborted = live.value("requests_total", outcome="abort")
    body = httpx.Request("POST", live.url, json=LONG | {"prompt": [PROMPT] * prompts}).content
    host, port = live.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        live.wait_for("num_requests_running", prompts)
    live.wait_for("requests_total", aborted + prompts, outcome="abort")
    live.wait_for("num_requests_running", 0)


@pytest.mark.usefixtures("slow")
def test_adapt_whose_client_goes_away_stops_learning(live: Live) -> None:
    name = live.new_session(gate="fixed", chunk_size=32)
    aborted = live.value("requests_total", outcome="abort")
    body = {"documents": [{"text": "value = compute(value, 17)\n" * 2000}], "stream": True}
    with live.http.stream("POST", f"/v1/sessions/{name}/adapt", json=body) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    live.wait_for("requests_total", aborted + 1, outcome="abort")
    version = live.session(name)["version"]
    assert 0 < version < 400
    time.sleep(0.1)
    assert live.session(name)["version"] == version


def test_request_beyond_the_queue_is_refused_until_there_is_room(
    narrow: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slow_down(narrow, monkeypatch)
    with narrow.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as running:
        # Kept: the answer is closed with its iterator.
        lines = running.iter_lines()
        next(lines)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(
                narrow.openai.completions.create,
                model=narrow.model,
                prompt=PROMPT,
                max_tokens=1,
                extra_body={"ignore_eos": True},
            )
            narrow.wait_for("num_requests_waiting", 1)
            with pytest.raises(openai.RateLimitError, match="1 requests are waiting") as caught:
                narrow.openai.completions.create(model=narrow.model, prompt=PROMPT)
            assert int(caught.value.response.headers["Retry-After"]) >= 1
            assert narrow.value("queue_rejections_total") == 1
            running.close()
            assert waiting.result().choices[0].finish_reason == "length"
    narrow.openai.completions.create(model=narrow.model, prompt=PROMPT, max_tokens=1)


def test_sessions_beyond_the_limit_are_refused(narrow: Live) -> None:
    names = [narrow.new_session() for _ in range(2)]
    answer = narrow.http.post("/v1/sessions", json={})
    assert answer.status_code == 429
    assert "2 sessions" in answer.json()["error"]["message"]
    assert int(answer.headers["Retry-After"]) >= 1
    for name in names:
        narrow.http.delete(f"/v1/sessions/{name}")
    assert narrow.http.post("/v1/sessions", json={}).status_code == 201


def test_session_in_use_can_not_be_deleted(live: Live, slow: None) -> None:
    name = live.new_session()
    body = LONG | {"stream": True, "ttt": {"session": name, "gate": "off"}}
    with live.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        refused = live.http.delete(f"/v1/sessions/{name}")
        assert refused.status_code == 409
        assert name in refused.json()["error"]["message"]
    live.wait_for("num_requests_running", 0)
    assert live.http.delete(f"/v1/sessions/{name}").status_code == 200


def test_prompts_that_belong_together_run_all_or_not_at_all(live: Live) -> None:
    name = live.new_session(gate="fixed", chunk_size=32)
    before = live.session(name)
    good = "x = 1\n" * 40
    ids = live.core.tokenizer.encode(good)
    answer = live.http.post(
        "/v1/completions", json={"prompt": [ids, ids, [10**6]], "ttt": {"session": name}}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt[2]"
    time.sleep(0.1)
    assert live.session(name) == before


async def test_readiness_tells_why_it_is_missing(tiny_llama_dir: Path) -> None:
    core = load_core(str(tiny_llama_dir), config=EngineConfig(measure_costs=False))
    engine = AsyncEngine(core)
    app = create_app(engine, Settings())
    async with httpx.AsyncClient(
        transport=ASGITransport(app), base_url="http://localhost"
    ) as client:

        async def refused() -> str:
            assert (await client.get("/health")).status_code == 200
            asked = await client.post("/v1/completions", json={"prompt": "x"})
            ready = await client.get("/ready")
            assert asked.status_code == ready.status_code == 503
            assert "Retry-After" in ready.headers
            return str(ready.json()["error"]["message"])

        assert "not started" in await refused()
        async with app.router.lifespan_context(app):
            assert (await client.get("/ready")).status_code == 200
        assert "shutting down" in await refused()
        engine.failure = RuntimeError("out of memory")
        assert "failed" in await refused()


@pytest.mark.parametrize("signals", [1, 2])
def test_request_that_outlasts_the_drain_is_cut_off_with_an_error(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, signals: int
) -> None:
    seconds = 0.2 if signals == 1 else 60.0
    with live_server(tiny_llama_dir, drain_seconds=seconds) as live:
        _slow_down(live, monkeypatch)
        with live.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
            lines = answer.iter_lines()
            received = [next(lines)]
            begun = time.monotonic()
            for _ in range(signals):
                live.server.handle_exit(signal.SIGTERM, None)
            received += [line for line in lines if line]
            assert time.monotonic() - begun < 4
    assert received[-2] == "event: error"
    error = json.loads(received[-1].removeprefix("data: "))["error"]
    assert error["code"] == "unavailable"
    assert "shut down" in error["message"]
