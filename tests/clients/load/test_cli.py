"""`ponderttt bench load` where something goes wrong: what it says, and that it says it early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from clients.results import read_results
from ponderttt.errors import InvalidRequestError, PonderError
from tests.clients.load.plain import Plain, Run, stream

FEW = ("--requests", "3", "--warmup", "1")


def usage(**fields: Any) -> httpx.Response:
    """A streamed completion whose last event counts so."""
    piece = {"choices": [{"index": 0, "text": "a", "finish_reason": "stop"}]}
    events = [piece, {"choices": [], **fields}]
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return httpx.Response(200, text=text + "data: [DONE]\n\n")


def test_load_of_which_nothing_succeeds_fails(run: Run) -> None:
    server = Plain(lambda _: httpx.Response(500, json={"error": {"message": "broke"}}))
    result = run(server, "--requests", "8", "--warmup", "0")
    assert isinstance(result.exception, PonderError)
    assert str(result.exception) == "no request was answered (8 failed); the table says why"
    assert "- 8 × 500: broke" in result.output
    assert "nfinished" not in result.output


def test_load_that_ends_while_it_warms_up_fails(run: Run) -> None:
    server = Plain(lambda _: stream(), seconds=0.3)
    result = run(server, "--duration", "0.1", "--warmup", "5")
    assert isinstance(result.exception, PonderError)
    assert "nothing was measured: all requests were to warm up" in str(result.exception)


def test_file_that_can_not_be_written_costs_no_plot(run: Run, tmp_path: Path) -> None:
    picture, table = tmp_path / "load.png", tmp_path / "load.md"
    places = ["--json", "/dev/full", "--markdown", str(table), "--plot", str(picture)]
    result = run(Plain(lambda _: stream()), *FEW, *places)
    assert isinstance(result.exception, PonderError)
    assert str(result.exception) == "/dev/full can't be written: No space left on device"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "time to first token" in table.read_text()


@pytest.mark.parametrize("name", ["load.xyz", "load"])
def test_plot_of_no_known_format_is_refused_before_any_load(
    run: Run, tmp_path: Path, name: str
) -> None:
    server = Plain(lambda _: stream())
    result = run(server, *FEW, "--plot", str(tmp_path / name))
    assert isinstance(result.exception, InvalidRequestError)
    assert "is no picture; give .png, .svg or .pdf" in str(result.exception)
    assert server.bodies == []


def test_report_on_a_load_that_was_killed_says_so(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert run(Plain(lambda _: stream()), "--requests", "30").exit_code == 0
    whole = run(Plain(lambda _: stream()), "--report", "--json", str(out))
    assert "nfinished" not in whole.output
    assert json.loads(out.read_text())["summary"]["unfinished"] is None
    path = tmp_path / "load.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:12]))
    result = run(Plain(lambda _: stream()), "--report", "--json", str(out))
    assert result.exit_code == 0, result.output
    said = "Unfinished: 11 of 34 requests, with those to warm up."
    assert f"**{said}**" in result.output
    assert json.loads(out.read_text())["summary"]["unfinished"] == said


def test_report_on_a_load_by_time_that_was_killed_says_so(run: Run, tmp_path: Path) -> None:
    assert run(Plain(lambda _: stream(), seconds=0.01), "--duration", "1").exit_code == 0
    assert "nfinished" not in run(Plain(lambda _: stream()), "--report").output
    path = tmp_path / "load.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:9]))
    result = run(Plain(lambda _: stream()), "--report")
    assert "**May be unfinished: the last request ended after 0." in result.output


def test_tokens_that_the_server_does_not_count_are_said(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = run(Plain(lambda _: stream(usage=None)), *FEW, "--json", str(out))
    assert result.exit_code == 0, result.output
    assert "| prompt tokens per second | - |" in result.output
    assert "- the server didn't count the tokens of 3 answers (`usage`)" in result.output
    summary = json.loads(out.read_text())["summary"]
    assert (summary["prompt_tokens"], summary["completion_tokens"]) == (None, 9)
    assert summary["uncounted"] == 3
    counted = run(Plain(lambda _: stream()), *FEW, "--fresh")
    assert "didn't count" not in counted.output


@pytest.mark.parametrize(
    ("fields", "outcome", "tells"),
    [
        ({"usage": {"prompt_tokens": "10"}}, "failed", "usage.prompt_tokens is '10', not a number"),
        ({"usage": [1]}, "failed", "usage is [1], not an object"),
        ({"usage": {"prompt_tokens": 1, "prompt_tokens_details": [2]}}, "ok", None),
        ({"usage": {}}, "ok", None),
        ({"usage": {"prompt_tokens": float("inf"), "completion_tokens": None}}, "ok", None),
        ({"ttt": {}}, "failed", "ttt.gate is missing"),
    ],
)
def test_usage_and_learning_of_wrong_types_fail_their_request_alone(
    run: Run, tmp_path: Path, fields: dict[str, Any], outcome: str, tells: str | None
) -> None:
    answers = iter([stream(), usage(**fields), stream()])
    result = run(Plain(lambda _: next(answers)), "--requests", "3", "--warmup", "0")
    assert result.exit_code == 0, result.output
    found = read_results(tmp_path / "load.jsonl")[1]
    assert [record["outcome"] for record in found] == ["ok", outcome, "ok"]
    assert tells is None or tells in found[1]["error"]


def test_stream_that_is_an_error_with_status_200_passes_the_reason_on(
    run: Run, tmp_path: Path
) -> None:
    broken = httpx.Response(200, json={"error": {"message": "model exploded"}})
    answers = iter([stream(), broken])
    run(Plain(lambda _: next(answers)), "--requests", "2", "--warmup", "0")
    assert "model exploded" in read_results(tmp_path / "load.jsonl")[1][1]["error"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"due": None}, "due is None, not a number"),
        ({"outcome": "ok", "seconds": None}, "seconds is None, not a number"),
        ({"chunks": 2}, "updates is missing"),
    ],
)
def test_report_on_a_damaged_record_names_line_and_field(
    run: Run, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    assert run(Plain(lambda _: stream()), *FEW).exit_code == 0
    path = tmp_path / "load.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | change)
    path.write_text("\n".join(lines) + "\n")
    result = run(Plain(lambda _: stream()), "--report")
    assert isinstance(result.exception, PonderError)
    assert f"load.jsonl is damaged, line 3: {told}; mend or remove" in str(result.exception)


class Busy(Plain):
    """One that is too busy for some of its paths, and says how often it was asked."""

    def __init__(self, *paths: str) -> None:
        super().__init__(lambda _: stream())
        self.paths, self.asked = paths, 0

    def sync(self, request: httpx.Request) -> httpx.Response:
        """Short answers."""
        if request.url.path in self.paths:
            self.asked += 1
            return httpx.Response(429, json={"error": {"message": "queue full"}})
        return super().sync(request)


def test_server_that_is_too_busy_to_count_tokens_is_asked_once(run: Run, tmp_path: Path) -> None:
    server = Busy("/tokenize")
    result = run(server, *FEW)
    assert result.exit_code == 0, result.output
    assert server.asked == 1
    assert read_results(tmp_path / "load.jsonl")[0].settings["chars_per_token"] == 3.5


def test_server_that_is_busy_before_the_load_is_asked_a_few_times_and_that_is_said(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clients.api.time.sleep", lambda seconds: None)
    server = Busy("/v1/models")
    result = run(server, *FEW, quiet=False)
    assert isinstance(result.exception, PonderError)
    assert "tried 3 times" in str(result.exception)
    assert result.output.count("the server is busy (429), asking again in") == 2
    again = Busy("/v1/models")
    assert "tried 5 times" in str(run(again, *FEW, "--retries", "4").exception)
    assert again.asked == 5


def test_usage_that_counts_nothing_is_said(run: Run) -> None:
    result = run(Plain(lambda _: usage(usage={})), *FEW)
    assert "- the server didn't count the tokens of 3 answers (`usage`)" in result.output


@pytest.mark.parametrize("option", ["--json", "--markdown", "--plot"])
def test_place_that_can_not_be_written_to_is_named_with_its_option(run: Run, option: str) -> None:
    server = Plain(lambda _: stream())
    result = run(server, *FEW, option, "/nowhere/x.png")
    assert isinstance(result.exception, InvalidRequestError)
    assert "/nowhere is no directory to write to" in str(result.exception)
    assert result.exception.param == option
    assert server.bodies == []
