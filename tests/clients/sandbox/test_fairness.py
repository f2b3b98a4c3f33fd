"""A program that others kept waiting gets a second chance, and no more."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import pytest

from clients.answers import Choice, Completion
from clients.bench.functional.drive import Unit, make_record
from clients.bench.functional.humaneval import load_humaneval
from clients.bench.functional.judge import judge
from clients.bench.functional.report import summary, table
from clients.bench.functional.run import KEY_FIELDS, METRICS
from clients.results import Header
from clients.sandbox import Limits, Outcome, Sandbox, Verdict
from clients.sandbox.turns import Turns
from tests.clients.sandbox.parallel import run_many

SETTINGS = {
    "part": None, "temperature": 0, "session": None, "problems": 1, "samples": 1, "source": "s",
    "prompting": "chat", "max_tokens": 9,
}  # fmt: skip
LIMITS = Limits(wall_seconds=10.0, cpu_seconds=4.0)


def timed_out(cpu_seconds: float | None) -> Outcome:
    return Outcome(Verdict.TIMED_OUT, "wall time", "", "", 10.0, cpu_seconds)


PASSED = Outcome(Verdict.PASSED, "", "", "", 0.1)
FAILED = Outcome(Verdict.FAILED, "no", "", "", 0.1)


@dataclass
class Scripted(Sandbox):
    """Programs come to what is written; runs nothing."""

    outcomes: dict[str, list[Outcome]]
    seconds: float = 0.0
    running: list[str] = field(default_factory=list)
    beside: dict[str, list[int]] = field(default_factory=dict)

    def run(self, program: str, limits: Limits = LIMITS, *, check: str | None = None) -> Outcome:
        self.running.append(program)
        time.sleep(self.seconds)
        self.beside.setdefault(program, []).append(len(self.running) - 1)
        self.running.remove(program)
        return self.outcomes[program].pop(0)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (timed_out(1.9), PASSED, Verdict.PASSED),
        (timed_out(0.0), FAILED, Verdict.FAILED),
        (timed_out(0.1), timed_out(0.1), Verdict.TIMED_OUT),
        # Half of the CPU limit, or ended by it.
        (timed_out(2.0), None, Verdict.TIMED_OUT),
        (timed_out(None), None, Verdict.TIMED_OUT),
        (FAILED, None, Verdict.FAILED),
    ],
)
def test_program_that_did_not_get_to_work_runs_once_more(
    first: Outcome, second: Outcome | None, verdict: Verdict
) -> None:
    sandbox = Scripted({"p": [first, *([second] if second else [])]})
    outcome = sandbox.run_fairly("p", LIMITS)
    assert outcome.verdict is verdict
    assert outcome.ran_again == (second is not None)
    assert sandbox.outcomes == {"p": []}


def test_second_run_counts_and_is_told() -> None:
    suite = load_humaneval(None)
    problem = suite.problems[0]
    program = problem.program(problem.solution)
    again = judge(Scripted({program: [timed_out(0.1), PASSED]}), LIMITS, problem, problem.solution)
    assert again.passed
    answer = Completion((Choice("x", "stop", None),), 1, 1, None, None, {}, 0.1)
    record = make_record(Unit(problem, 0), answer, problem.solution, again)
    assert record["ran_again"] == 1
    header = Header("humaneval", 0, "m", "http://here", None, SETTINGS, KEY_FIELDS, METRICS)
    found = summary(header, [record], [1])
    assert found["ran_again"] == 1
    assert "1 programs used up their wall time" in table(found, None)
    del record["ran_again"]
    assert summary(header, [record], [1])["ran_again"] == 0


def test_second_run_has_none_beside_it() -> None:
    outcomes = {str(n): [timed_out(0.1), PASSED] if n % 3 == 0 else [PASSED] for n in range(12)}
    sandbox = Scripted(outcomes, seconds=0.03)
    found = run_many(sandbox, [(program, None) for program in outcomes], LIMITS, workers=4)
    assert all(outcome.passed for outcome in found)
    assert [outcome.ran_again for outcome in found] == [n % 3 == 0 for n in range(12)]
    assert all(sandbox.beside[str(n)][1] == 0 for n in range(0, 12, 3))
    assert max(beside[0] for beside in sandbox.beside.values()) > 0


def test_who_waits_to_be_alone_comes_before_those_who_come_later() -> None:
    turns, order = Turns(), []

    def alone() -> None:
        with turns.alone():
            order.append("alone")

    def together() -> None:
        with turns.together():
            order.append("together")

    with turns.together():
        threads = [threading.Thread(target=alone), threading.Thread(target=together)]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        assert order == []
    for thread in threads:
        thread.join(5)
    assert order == ["alone", "together"]


def test_sleep_is_told_from_work_also_of_children(sandbox: Sandbox) -> None:
    limits = Limits(wall_seconds=1.5, cpu_seconds=60)
    child = "import os\nif os.fork() == 0:\n    while True: pass\nos.wait()\n"
    asleep, busy, in_child = (
        sandbox.run(program, limits)
        for program in ("import time\ntime.sleep(60)", "while True: pass", child)
    )
    for outcome in (asleep, busy, in_child):
        assert outcome.verdict is Verdict.TIMED_OUT
        assert outcome.cpu_seconds is not None
    assert (asleep.cpu_seconds or 0) < 0.3
    assert asleep.is_starved(limits)
    assert (busy.cpu_seconds or 0) > 2 * (asleep.cpu_seconds or 0)
    assert (in_child.cpu_seconds or 0) > 2 * (asleep.cpu_seconds or 0)
