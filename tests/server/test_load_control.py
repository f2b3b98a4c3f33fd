"""Load: turns between keys, deadlines, readers who don't read, strange headers, a gentle stop."""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.runner import bind
from tests.server.live import Live, live_server
from tests.server.test_auth import bearer_of, key_file
from tests.server.test_limits import LONG, _slow_down

SHORT: dict[str, Any] = LONG | {"max_tokens": 8}


@contextmanager
def narrow(directory: Path, tmp_path: Path, **options: Any) -> Iterator[Live]:
    """A server with keys that runs one sequence at a time."""
    path = key_file(tmp_path, "alice", "bob", "few", "root")
    with live_server(directory, api_key_file=path, max_num_seqs=1, **options) as live:
        live.http.headers.update(bearer_of("root"))
        yield live


def ask(live: Live, name: str, **changes: Any) -> httpx.Response:
    return live.http.post("/v1/completions", json=SHORT | changes, headers=bearer_of(name))


def wait_in_line(
    live: Live, pool: ThreadPoolExecutor, name: str, count: int
) -> list[Future[httpx.Response]]:
    """Requests of a key, of which one runs and the others wait."""
    futures = [pool.submit(ask, live, name) for _ in range(count)]
    live.wait_for("num_requests_waiting", count - 1)
    return futures


def test_key_with_one_request_does_not_wait_for_all_of_another(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with narrow(tiny_llama_dir, tmp_path) as live, ThreadPoolExecutor(16) as pool:
        _slow_down(live, monkeypatch)
        alices = wait_in_line(live, pool, "alice", 10)
        assert ask(live, "bob").status_code == 200
        assert sum(future.done() for future in alices) <= 4
        assert {future.result().status_code for future in alices} == {200}


def test_key_beyond_its_line_is_refused_while_another_is_not(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with narrow(tiny_llama_dir, tmp_path) as live, ThreadPoolExecutor(16) as pool:
        _slow_down(live, monkeypatch)
        with live.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as running:
            lines = running.iter_lines()
            next(lines)
            waiting = [pool.submit(ask, live, "few") for _ in range(3)]
            live.wait_for("num_requests_waiting", 3)
            for stream in (False, True):
                refused = ask(live, "few", stream=stream)
                assert refused.status_code == 429
                assert "3 requests of yours" in refused.json()["error"]["message"]
                assert int(refused.headers["Retry-After"]) >= 1
            another = pool.submit(ask, live, "bob")
            live.wait_for("num_requests_waiting", 4)
        assert another.result().status_code == 200
        assert {future.result().status_code for future in waiting} == {200}


@pytest.mark.parametrize("stream", [False, True])
def test_request_that_waits_too_long_is_refused_with_a_status(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    with narrow(tiny_llama_dir, tmp_path, max_wait_seconds=0.3) as live:
        _slow_down(live, monkeypatch)
        with live.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as running:
            lines = running.iter_lines()
            next(lines)
            late = ask(live, "bob", stream=stream)
        assert late.status_code == 429
        assert "0.3 s" in late.json()["error"]["message"]
        assert int(late.headers["Retry-After"]) >= 1
        assert ask(live, "bob").status_code == 200


def test_stop_hands_back_what_still_waits_with_a_status(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with narrow(tiny_llama_dir, tmp_path, drain_seconds=0.3) as live, ThreadPoolExecutor(8) as pool:
        _slow_down(live, monkeypatch)
        with live.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as running:
            lines = running.iter_lines()
            next(lines)
            waiting = [pool.submit(ask, live, "bob", stream=s) for s in (False, True) * 2]
            live.wait_for("num_requests_waiting", 4)
            live.server.handle_exit(signal.SIGTERM, None)
            for future in waiting:
                answer = future.result(timeout=10)
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "unavailable"
                assert int(answer.headers["Retry-After"]) >= 1
            assert "event: error" in list(lines)


def test_stop_lets_what_waits_finish_where_there_is_time(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with narrow(tiny_llama_dir, tmp_path, drain_seconds=30) as live, ThreadPoolExecutor(8) as pool:
        _slow_down(live, monkeypatch)
        waiting = wait_in_line(live, pool, "alice", 5)
        live.server.handle_exit(signal.SIGTERM, None)
        assert {future.result(timeout=20).status_code for future in waiting} == {200}


def test_reader_who_does_not_read_holds_up_nobody_and_is_cut_off(
    tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bind_with_little_memory(host: str, port: int) -> socket.socket:
        sock = bind(host, port)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return sock

    # Or the kernel would take the whole stream.
    monkeypatch.setattr("tests.server.live.bind", bind_with_little_memory)
    much = LONG | {"n": 12, "logprobs": 5, "max_tokens": 400, "stream": True}
    with live_server(tiny_llama_dir, stalled_reader_seconds=0.5) as live:
        body = httpx.Request("POST", live.url, json=much).content
        host, port = live.url.removeprefix("http://").split(":")
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nX-Request-Id: stalled\r\n\r\n"
        )
        with socket.socket() as connection, caplog.at_level(logging.INFO, "server"):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            connection.sendall(head.encode() + body)
            live.wait_for("num_requests_running", 12)
            while live.value("num_requests_running"):
                begun = time.monotonic()
                answer = live.http.post("/v1/completions", json=SHORT)
                assert answer.status_code == 200
                # The others are not waited for: this takes as long as a few of their tokens.
                assert time.monotonic() - begun < 10
            until = time.monotonic() + 20
            while not any("stalled_reader" in str(vars(r)) for r in caplog.records):
                assert time.monotonic() < until, "the reader was not cut off"
                time.sleep(0.05)
        assert any("nobody has read" in message for message in caplog.messages)
        assert live.value("num_requests_running") == 0


# --- headers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        b"Host: [", b"Host: \xff\xfe", b"Host: a b", b"Host:", b"Host: x\r\nHost: y",
        b"Content-Length: \xb2", b"Content-Length: -1", b"Content-Length: 1\r\nContent-Length: 2",
        b"Content-Length: 9999999999999999999999", b"Transfer-Encoding: odd",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5", b"Content-Type: \xff\x80",
        b"Content-Type: application/json\r\nContent-Type: text/plain", b"X: " + b"y" * 60_000,
        b"Authorization: Bearer \xf0\x9f\x94\x91", b"Authorization: " + b"Bearer " * 2000,
        b"X-Request-Id: \xff", b"X-Request-Id: a\r\nX-Request-Id: b", b"no colon", b": empty",
        b"bad name: 1", b"Accept: \x01", b"Expect: 101-whatever", b"Cookie: \xff=\xff; ;;=",
        b"Upgrade: websocket\r\nConnection: Upgrade", b"Range: bytes=9-1", b"If-None-Match: \xff",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [b"/health", b"/v1/models", b"/v1/nothing", b"/v1/models/"])
def test_strange_headers_are_no_failure_of_the_server(
    live: Live, header: bytes, path: bytes
) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    own = b"" if header.startswith(b"Host") else b"Host: localhost\r\n"
    head = b"GET " + path + b" HTTP/1.1\r\n" + own + header + b"\r\nConnection: close\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head)
        promises_body = b"chunked" in header or b"Content-Length" in header
        if promises_body:
            connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(65536)
    # Nothing at all where the promised body never came.
    if answer or not promises_body:
        assert answer.startswith(b"HTTP/1.1 ")
        assert 200 <= int(answer.split()[1]) < 500
    assert live.http.get("/health").status_code == 200
