"""`ponderttt bench load` against servers without a model, and one real one."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner

import clients.async_api
import clients.load.run
from clients.load.cli import load
from clients.load.drive import Limits
from clients.load.workload import arrivals
from clients.results import read_results
from ponderttt.errors import InvalidRequestError, PonderError
from tests.clients.load.plain import Plain, Run, stream
from tests.server.live import Live, live_server


def records(tmp_path: Path) -> list[dict[str, Any]]:
    return read_results(tmp_path / "load.jsonl")[1]


def test_closed_load_keeps_its_concurrency_and_sends_nothing_that_others_do_not_know(
    run: Run, tmp_path: Path
) -> None:
    server = Plain(lambda _: stream(), seconds=0.01)
    out = tmp_path / "out.json"
    result = run(server, "--concurrency", "5", "--requests", "40", "--json", str(out))
    assert result.exit_code == 0, result.output
    assert server.most == 5
    assert len(server.bodies) == 44
    allowed = {"prompt", "model", "max_tokens", "temperature", "stream", "stream_options"}
    assert set().union(*server.bodies) == allowed
    written = json.loads(out.read_text())
    summary = written["summary"]
    assert (summary["requests"], summary["warmup"], summary["ok"]) == (40, 4, 40)
    assert summary["completion_tokens"] == 120
    # No more than there are users, by Little's law as well.
    assert 1 < summary["running"] <= 5.001
    assert summary["seconds"]["p50"] >= 0.01
    assert summary["goodput"]["share"] == 1.0
    assert written["server_version"] is None
    assert written["seed"] == 0


def test_open_load_arrives_at_its_rate_whatever_the_server_does(run: Run, tmp_path: Path) -> None:
    server = Plain(lambda _: stream(), seconds=0.3)
    result = run(server, "--rate", "100", "--duration", "1", "--warmup", "0")
    assert result.exit_code == 0, result.output
    # Of a Poisson process with mean 100; the draws are the seed's.
    assert 70 <= len(server.bodies) <= 130
    assert server.most > 15
    dues = sorted(record["due"] for record in records(tmp_path))
    assert dues[-1] <= 1.0
    assert len({record["user"] for record in records(tmp_path)}) == 8


def test_same_seed_asks_the_same_and_another_seed_something_else(run: Run, tmp_path: Path) -> None:
    def prompts(seed: int) -> list[tuple[str, int]]:
        server = Plain(lambda _: stream())
        lengths = ["--prompt-tokens", "lognormal:50:0.8", "--output-tokens", "uniform:4:40"]
        arguments = ["--concurrency", "3", "--requests", "9", "--warmup", "0", "--reuse", "0.5"]
        result = run(server, *lengths, *arguments, "--seed", str(seed), "--fresh")
        assert result.exit_code == 0, result.output
        assert all(4 <= body["max_tokens"] <= 40 for body in server.bodies)
        return sorted((body["prompt"], body["max_tokens"]) for body in server.bodies)

    first = prompts(1)
    assert first == prompts(1)
    assert first != prompts(2)


def test_rejections_timeouts_and_failures_are_told_apart(run: Run, tmp_path: Path) -> None:
    answers = iter([
        httpx.Response(429, json={"error": {"message": "full"}}, headers={"Retry-After": "0"}),
        httpx.Response(500, json={"error": {"message": "broke"}}),
        httpx.Response(200, text='data: {"choices": []}\n\n'),
        httpx.Response(200, html="<html>login</html>"),
        stream(),
    ])  # fmt: skip
    server = Plain(lambda _: next(answers))
    result = run(server, "--requests", "5", "--warmup", "0", "--ttft-bound", "5")
    assert result.exit_code == 0, result.output
    assert [record["outcome"] for record in records(tmp_path)] == [
        "rejected", "failed", "failed", "failed", "ok",
    ]  # fmt: skip
    assert [record["seconds"] is None for record in records(tmp_path)] == [True] * 4 + [False]
    assert all(record["elapsed"] > 0 for record in records(tmp_path))
    errors = [record["error"] for record in records(tmp_path)]
    for error, tells in zip(errors, ["full", "broke", "broke off", "text/html"], strict=False):
        assert tells in error
    assert "| ok / rejected / timed out / failed | 1 / 1 / 0 / 3 |" in result.output
    assert "(20.0% of requests)" in result.output


def test_request_that_takes_too_long_is_a_timeout(run: Run, tmp_path: Path) -> None:
    server = Plain(lambda _: stream(), seconds=5.0)
    run(server, "--requests", "2", "--warmup", "0", "--timeout", "0.1")
    assert [record["outcome"] for record in records(tmp_path)] == ["timeout"] * 2


def test_server_that_only_fails_ends_the_run_with_its_reason(run: Run, tmp_path: Path) -> None:
    server = Plain(lambda _: httpx.Response(400, json={"error": {"message": "budget: 0.5"}}))
    result = run(server, "--concurrency", "2")
    assert isinstance(result.exception, PonderError)
    assert "budget: 0.5" in str(result.exception)
    assert 20 <= len(records(tmp_path)) <= 22


def test_server_that_hangs_from_the_beginning_ends_the_run(run: Run, tmp_path: Path) -> None:
    server = Plain(lambda _: stream(), seconds=5.0)
    result = run(server, "--concurrency", "10", "--requests", "500", "--timeout", "0.1")
    assert isinstance(result.exception, PonderError)
    assert "none was ever answered; the last: took longer than 0.1 s" in str(result.exception)
    assert 20 <= len(records(tmp_path)) <= 30


def test_server_that_hangs_later_is_measured(run: Run, tmp_path: Path) -> None:
    def answer(_: dict[str, Any]) -> httpx.Response:
        server._seconds = 5.0
        return stream()

    server = Plain(answer)
    arguments = ["--concurrency", "10", "--requests", "40", "--timeout", "0.5", "--warmup", "0"]
    result = run(server, *arguments)
    assert result.exit_code == 0, result.output
    outcomes = [record["outcome"] for record in records(tmp_path)]
    assert outcomes.count("timeout") > 25
    assert outcomes.count("ok") + outcomes.count("timeout") == 40


def test_server_that_rejects_for_ever_is_asked_after_a_bounded_wait(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clients.load.drive.LONGEST_WAIT", 0.05)
    busy: dict[str, Any] = {
        "json": {"error": {"message": "full"}},
        "headers": {"Retry-After": "86400"},
    }
    server = Plain(lambda _: httpx.Response(429, **busy))
    begun = time.perf_counter()
    result = run(server, "--concurrency", "2", "--requests", "30", "--warmup", "0")
    assert "no request was answered (30 rejected)" in str(result.exception)
    # About fifteen requests of a user, with a wait after each but the last.
    assert 0.5 <= time.perf_counter() - begun < 20
    assert [record["outcome"] for record in records(tmp_path)] == ["rejected"] * 30
    assert "| ok / rejected / timed out / failed | 0 / 30 / 0 / 0 |" in result.output
    assert "| answers per second | 0.00 |" in result.output


def test_nobody_waits_after_the_last_request_was_sent(run: Run, tmp_path: Path) -> None:
    busy: dict[str, Any] = {
        "json": {"error": {"message": "full"}},
        "headers": {"Retry-After": "30"},
    }
    first = iter([httpx.Response(429, **busy)])
    server = Plain(lambda _: next(first, None) or stream())
    begun = time.perf_counter()
    result = run(server, "--concurrency", "2", "--requests", "9", "--warmup", "0")
    assert result.exit_code == 0, result.output
    assert time.perf_counter() - begun < 15
    outcomes = [record["outcome"] for record in records(tmp_path)]
    assert (outcomes.count("rejected"), outcomes.count("ok")) == (1, 8)


def test_late_client_hides_nothing_of_what_users_of_an_open_load_wait(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = asyncio.sleep

    async def late(seconds: float) -> None:
        await real(0 if seconds == 0 else max(seconds, 0) + 0.3)

    monkeypatch.setattr(asyncio, "sleep", late)
    server = Plain(lambda _: stream())
    result = run(server, "--rate", "20", "--requests", "6", "--warmup", "0", "--seed", "4")
    assert result.exit_code == 0, result.output
    found = sorted(records(tmp_path), key=lambda record: int(record["number"]))
    assert len(found) == 6
    assert all(r["lag"] >= 0.29 and r["seconds"] >= r["ttft"] >= r["lag"] for r in found)
    # They were due as the process has it, not when they were sent.
    generator, due = arrivals(20.0, 4), 0.0
    for record in found:
        due += generator.expovariate(20.0)
        assert record["due"] == pytest.approx(due)
        generator.randrange(8)
    assert "this client was late" in result.output


def test_open_load_sends_no_more_than_may_run_at_once_and_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients.load.run, "Limits", partial(Limits, running=3))
    server = Plain(lambda _: stream(), seconds=1.0)
    result = run(server, "--rate", "200", "--requests", "40", "--warmup", "0")
    assert result.exit_code == 0, result.output
    assert server.most == 3
    found = records(tmp_path)
    assert len(found) == 40
    unsent = [record for record in found if record["outcome"] == "failed"]
    assert len(unsent) == 40 - len(server.bodies) >= 20
    assert {record["error"] for record in unsent} == {
        "not sent: 3 requests were running already"
    }  # fmt: skip
    assert all(record["seconds"] is None and record["elapsed"] == 0 for record in unsent)


def test_prompts_that_were_cut_to_fit_are_counted(run: Run, tmp_path: Path) -> None:
    server = Plain(lambda _: stream(), context=100)
    out = tmp_path / "out.json"
    arguments = ["--requests", "20", "--warmup", "2", "--prompt-tokens", "uniform:10:90"]
    result = run(server, *arguments, "--output-tokens", "20", "--json", str(out))
    assert result.exit_code == 0, result.output
    found = [record for record in records(tmp_path) if not record["warmup"]]
    cut = sum(record["cut"] for record in found)
    assert 0 < cut < 20
    # Cut are those that are as long as may be, and no others.
    most = max(len(body["prompt"]) for body in server.bodies)
    assert sum(len(body["prompt"]) == most for body in server.bodies[2:]) == cut
    assert json.loads(out.read_text())["summary"]["cut"] == cut
    assert f"- {cut} prompts were cut to fit the model's context of 100 tokens" in result.output


def test_interrupted_run_is_reported_as_far_as_it_got(run: Run, tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> httpx.Response:
        if len(server.bodies) == 8:
            raise KeyboardInterrupt
        return stream()

    server = Plain(answer)
    result = run(server, "--requests", "50")
    assert isinstance(result.exception, PonderError)
    assert "interrupted" in str(result.exception)
    assert len(records(tmp_path)) == 7
    assert "| requests (to warm up, not counted) | 3 (4) |" in result.output


def test_result_file_is_not_overwritten_unless_asked(run: Run) -> None:
    server = Plain(lambda _: stream())
    few = ["--requests", "2", "--warmup", "0"]
    assert run(server, *few).exit_code == 0
    result = run(server, *few)
    assert isinstance(result.exception, InvalidRequestError)
    assert "can't be resumed" in str(result.exception)
    assert run(server, *few, "--fresh").exit_code == 0
    assert len(server.bodies) == 4


def test_report_judges_an_old_run_by_new_bounds(run: Run, tmp_path: Path) -> None:
    server = Plain(lambda _: stream(), seconds=0.02)
    assert run(server, "--requests", "4").exit_code == 0
    picture = tmp_path / "load.png"
    result = run(server, "--report", "--ttft-bound", "0.001", "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert "TTFT ≤ 1 ms" in result.output
    assert "(0.0% of requests)" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "tells"),
    [
        (["--rate", "1", "--concurrency", "2"], "give one"),
        (["--rate", "1", "--think", "1"], "--think"),
        (["--prompt-tokens", "lognormal:5"], "no distribution"),
        (["--output-tokens", "uniform:9:3"], "no distribution"),
        (["--output-tokens", "nan"], "goes beyond"),
        (["--ttt", "budget"], "KEY=VALUE"),
        (["--texts", "/nowhere/at/all"], "doesn't exist"),
        (["--model", "other"], "give plain"),
        (["--json", "/nowhere/at/all.json"], "no directory"),
    ],
)
def test_bad_option_is_refused_before_any_load(run: Run, arguments: list[str], tells: str) -> None:
    server = Plain(lambda _: stream())
    result = run(server, *arguments)
    assert isinstance(result.exception, InvalidRequestError)
    assert tells in str(result.exception)
    assert server.bodies == []


@pytest.fixture(scope="module")
def live(tiny_llama_dir: Path) -> Iterator[Live]:
    """A server of the tiny Llama."""
    with live_server(tiny_llama_dir) as server:
        yield server


def test_load_on_a_real_server_learns_in_sessions_and_agrees_with_its_counts(
    live: Live, tmp_path: Path
) -> None:
    app = typer.Typer()
    app.command()(load)
    before = live.value("generation_tokens_total")
    output = tmp_path / "load.jsonl"
    arguments = [
        "--base-url", f"{live.url}/v1", "--concurrency", "4", "--sessions", "2", "--requests", "12",
        "--warmup", "0", "--prompt-tokens", "uniform:40:120", "--output-tokens", "8",
        "--ttt", "session=load-{n}", "--ttt", "gate=fixed", "--ttt", "action=UPDATE_1",
        "--ttt", "chunk_size=32", "--ttt", "budget=6", "--body", "ignore_eos=true",
        "--output", str(output), "--quiet",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    header, found = read_results(output)
    outcomes = [record["outcome"] for record in found]
    assert outcomes.count("ok") == 12, [record["error"] for record in found]
    assert all(record["completion_tokens"] == 8 for record in found)
    assert live.value("generation_tokens_total") - before == 12 * 8
    assert sum(record["updates"] for record in found) > 0
    assert all(0 < record["ttft"] <= record["seconds"] for record in found)
    assert header.model == live.model
    assert (header.server_version or "").startswith("PonderTTT")
    assert header.settings["server.rule.learning_rate"] == 0.01
    sessions = {session["id"] for session in live.http.get("/v1/sessions").json()["data"]}
    assert not sessions & {"load-0", "load-1"}
    assert "recorder" not in {thread.name for thread in threading.enumerate()}
