"""The log: one line per request, with ids and without anything that was said."""

from __future__ import annotations

import json
import logging
import logging.config
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.logs import REQUEST_ID, JsonFormatter, TextFormatter, log_config
from server.request_log import RequestRecord
from tests.server.live import PROMPT, Live, live_server
from tests.server.test_auth import bearer_of, key_file

MARK = "zebra-7391"


@pytest.fixture(scope="module")
def guarded(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with keys."""
    path = key_file(tmp_path_factory.mktemp("keys"), "alice")
    with live_server(tiny_llama_dir, api_key_file=path) as server:
        server.http.headers.update(bearer_of("alice"))
        yield server


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
    """What the server logs from now on, as JSON."""
    found: list[dict[str, Any]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(json.loads(JsonFormatter().format(record)))

    handler = Handler()
    with caplog.at_level(logging.DEBUG, "server"):
        logging.getLogger("server").addHandler(handler)
        try:
            yield found
        finally:
            logging.getLogger("server").removeHandler(handler)


def wait_for_line(lines: list[dict[str, Any]], request_id: str) -> dict[str, Any]:
    """The line of a request; it comes after its answer."""
    until = time.monotonic() + 5
    while True:
        mine = [line for line in lines if line["request_id"] == request_id]
        if found := [line for line in mine if line["logger"] == "server.requests"]:
            (line,) = found
            return line
        assert time.monotonic() < until, "no line"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_completion_has_one_line_with_ids_and_tokens(
    guarded: Live, lines: list[dict[str, Any]], stream: bool
) -> None:
    name = guarded.new_session()
    body = {"prompt": PROMPT * 4, "max_tokens": 5, "ignore_eos": True, "stream": stream,
            "ttt": {"session": name, "action": "UPDATE_1", "chunk_size": 32}}  # fmt: skip
    answer = guarded.http.post(
        "/v1/completions", json=body, headers={"X-Request-Id": f"r-{stream}"}
    )
    assert answer.headers["x-request-id"] == f"r-{stream}"
    line = wait_for_line(lines, f"r-{stream}")
    expected = {
        "level": "info", "method": "POST", "route": "/v1/completions", "status": 200,
        "outcome": "ok", "key_id": "alice", "session": name, "generated_tokens": 5,
        "prompt_tokens": len(guarded.core.tokenizer.encode(PROMPT * 4)),
    }  # fmt: skip
    assert line == line | expected
    assert line["learned_chunks"] == guarded.session(name)["version"] > 0
    assert line["seconds"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])


def test_nothing_that_was_said_and_no_key_is_in_the_log(
    guarded: Live, lines: list[dict[str, Any]]
) -> None:
    http = guarded.http
    answers = [
        http.post("/v1/completions", json={"prompt": MARK, "max_tokens": 3, "echo": True}),
        http.post("/v1/completions", json={"prompt": MARK, "max_tokens": 3, "stream": True}),
        http.post("/v1/completions", json={"prompt": MARK, "user": 5, MARK: MARK}),
        http.post("/v1/completions", json={"prompt": "a", "ttt": {"session": MARK + " " + MARK}}),
        http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": MARK}]}),
        http.post("/v1/sessions", json={"id": MARK + "\n" + MARK}),
        http.post("/tokenize", json={"prompt": MARK}),
        http.get(f"/v1/{MARK}?{MARK}={MARK}"),
        http.get("/v1/models", headers=bearer_of(MARK) | {"X-Request-Id": f"{MARK} a"}),
        httpx.get(f"{guarded.url}/v1/models", headers={"User-Agent": MARK, "Cookie": MARK}),
    ]
    assert {answer.status_code for answer in answers} == {200, 400, 401, 404}
    http.get("/health", headers={"X-Request-Id": "last"})
    wait_for_line(lines, "last")
    written = json.dumps(lines)
    assert len(lines) >= len(answers)
    assert MARK not in written
    assert "key-of-alice" not in written


def test_outcomes_are_told_apart(guarded: Live, lines: list[dict[str, Any]]) -> None:
    guarded.http.post("/v1/completions", json={"max_tokens": 1}, headers={"X-Request-Id": "bad"})
    line = wait_for_line(lines, "bad")
    assert (line["status"], line["outcome"]) == (400, "refused")
    assert "prompt_tokens" not in line
    httpx.get(f"{guarded.url}/v1/models", headers={"X-Request-Id": "stranger"})
    line = wait_for_line(lines, "stranger")
    assert (line["status"], line["outcome"], line["route"]) == (401, "refused", "unknown")
    assert "key_id" not in line


def test_client_that_goes_before_its_body_has_come_is_no_failure_of_the_server(
    live: Live, lines: list[dict[str, Any]]
) -> None:
    address = httpx.URL(live.url)
    with socket.create_connection((address.host, address.port)) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: gone\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        time.sleep(0.2)
    line = wait_for_line(lines, "gone")
    assert line["outcome"] == "aborted"
    assert [each["level"] for each in lines if each["request_id"] == "gone"] == ["info"]
    assert live.value("http_requests_total", method="POST", route="/v1/completions",
                      status="500") == 0  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "aborted"),
        ({"status": 200}, "ok"),
        ({"status": 200, "requests": 2, "done": 2}, "ok"),
        ({"status": 200, "requests": 2, "done": 1}, "aborted"),
        ({"status": 200, "requests": 1, "error": "unavailable"}, "failed"),
        ({"status": 404}, "refused"),
        ({"status": 499, "requests": 1}, "aborted"),
        ({"status": 503, "requests": 1}, "failed"),
    ],
)
def test_outcome_of_a_record(changes: dict[str, Any], outcome: str) -> None:
    assert RequestRecord("a", **changes).outcome == outcome


@pytest.mark.parametrize(
    "given",
    [
        [], [b""], [b"a b"], [b"a\xff"], [b"x" * 129], [b"a", b"a"], [b"\xc3\xa9"],
        [b'"quoted"'], [b"<script>"],
    ],
)  # fmt: skip
def test_unfit_request_ids_are_replaced(live: Live, given: list[bytes]) -> None:
    headers = [(b"X-Request-Id", value) for value in given]
    answer = httpx.get(f"{live.url}/health", headers=headers)
    assert answer.status_code == 200
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_every_answer_has_the_id_errors_included(live: Live) -> None:
    for method, path in (("GET", "/nowhere"), ("PUT", "/v1/models"), ("POST", "/v1/completions")):
        answer = live.http.request(method, path, headers={"X-Request-Id": "Trace/1:a.b_c@d=e+f-"})
        assert answer.status_code >= 400
        assert answer.headers["x-request-id"] == "Trace/1:a.b_c@d=e+f-"


def test_text_is_a_line_and_json_an_object_each_with_the_traceback() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.LogRecord("a.b", logging.ERROR, "", 0, "it %s", ("broke",), (
            type(error), error, error.__traceback__))  # fmt: skip
    record.fields = {"session": "s", "nothing": None}
    token = REQUEST_ID.set("r1")
    try:
        text, line = TextFormatter().format(record), JsonFormatter().format(record)
    finally:
        REQUEST_ID.reset(token)
    assert text.startswith("ERROR:    it broke request_id=r1 session=s\nTraceback")
    assert "\n" not in line
    entry = json.loads(line)
    assert entry | {"time": 0, "exception": ""} == {
        "time": 0, "level": "error", "logger": "a.b", "message": "it broke", "request_id": "r1",
        "session": "s", "exception": "",
    }  # fmt: skip
    assert "two\nlines" in entry["exception"]


@pytest.mark.parametrize("level", ["critical", "error", "warning", "info", "debug"])
def test_configuration_is_one_that_logging_takes(level: str) -> None:
    config = log_config("json", level)
    assert config["loggers"]["server"]["level"] == level.upper()
    # Libraries that print what they send are not asked to.
    assert logging.getLevelName(config["root"]["level"]) in ("WARNING", "ERROR", "CRITICAL")
    logging.config.DictConfigurator(config)  # parses it


def test_unexpected_failure_has_an_id_a_line_and_a_place_in_the_metrics(
    live: Live, lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = live.new_session()

    def fail(session: object) -> float:
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr(live.core.sessions, "norm", fail)
    where = {"method": "GET", "route": "/v1/sessions/{session_id}", "status": "500"}
    answer = live.http.get(f"/v1/sessions/{name}", headers={"X-Request-Id": "odd"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "odd")
    assert answer.json()["error"]["type"] == "server_error"
    line = wait_for_line(lines, "odd")
    assert (line["status"], line["outcome"]) == (500, "failed")
    trace = next(each for each in lines if each["message"] == "a request failed unexpectedly")
    assert "nobody thought of this" in json.dumps(trace)
    assert live.value("http_requests_total", **where) == 1.0
