"""The evaluation: every method under every budget, as JSON and as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ponderttt.errors import InvalidRequestError, PonderError
from training.analysis.gains import TraceEpisode
from training.analysis.oracle import oracle
from training.analysis.outcomes import (
    Comparison,
    MethodResult,
    compare,
    outcome_of,
    summarise,
)
from training.analysis.playing import Chooser, play
from training.analysis.statistics import Interval
from training.analysis.tables import markdown
from training.environments.budgeted import BudgetRules

ORACLE = "oracle"
POLICY = "policy"


class ReportFormatError(PonderError):
    """A report that is damaged, or of another version."""


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """What came out.

    Args:
        cost_model: in which the budgets are counted.
        repositories, episodes, chunks: that were played, per method, budget and seed.
        seeds: of the draws.
        results: by budget, then by method; the oracle last.
        comparisons: of the policy with every other method but the oracle, by budget.
    """

    cost_model: str
    repositories: int
    episodes: int
    chunks: int
    seeds: tuple[int, ...]
    results: tuple[MethodResult, ...]
    comparisons: tuple[Comparison, ...]

    def result(self, method: str, budget: float) -> MethodResult:
        """Of one method under one budget; InvalidRequestError where there is none."""
        for result in self.results:
            if (result.method, result.budget) == (method, budget):
                return result
        raise InvalidRequestError("method", f"{method!r} was not played at a budget of {budget:g}")

    def to_json(self) -> str:
        """Comes back from `from_json`."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> EvaluationReport:
        """Read what `to_json` wrote; ReportFormatError for anything else."""
        try:
            values = json.loads(text)
            values["seeds"] = tuple(values["seeds"])
            values["results"] = tuple(_method(row) for row in values["results"])
            values["comparisons"] = tuple(_comparison(row) for row in values["comparisons"])
            return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise ReportFormatError(f"not an evaluation report: {error!r}") from error

    def to_markdown(self) -> str:
        """Two tables: the methods, and the policy's differences from them."""
        return markdown(self.results, self.comparisons)


def evaluate(
    episodes: Sequence[TraceEpisode],
    methods: Mapping[str, Chooser],
    rules: BudgetRules,
    budgets: Sequence[float],
    seeds: Sequence[int] = (0,),
    subject: str | None = POLICY,
) -> EvaluationReport:
    """Play every method on every episode under every budget, and the oracle besides.

    Args:
        episodes: held out.
        methods: by name; `PerBudget` for what depends on the budget.
        rules: cost models; the oracle is a bound only where they enforce the budget.
        budgets: highest mean costs, × forward.
        seeds: of the draws; gains are means over them.
        subject: the method that the others are compared with; None: no comparisons.
    Raises:
        InvalidRequestError: nothing to play, or `subject` is not among the methods.
    """
    for name, given in (("episodes", episodes), ("budgets", budgets), ("seeds", seeds)):
        if not given:
            raise InvalidRequestError(name, "give one or more")
    if subject is not None and subject not in methods:
        raise InvalidRequestError("subject", f"{subject!r} is not one of {', '.join(methods)}")
    results: list[MethodResult] = []
    comparisons: list[Comparison] = []
    for budget in budgets:
        ideal = [outcome_of(ORACLE, budget, e, oracle(e, rules, budget).played) for e in episodes]
        found = {
            name: summarise(
                [
                    outcome_of(name, budget, e, play(e, chooser, rules, budget, seed))
                    for seed in seeds
                    for e in episodes
                ],
                ideal,
            )
            for name, chooser in methods.items()
        }
        results += [*found.values(), summarise(ideal, ideal)]
        if subject is not None:
            others = [result for name, result in found.items() if name != subject]
            comparisons += compare(found[subject], others)
    return EvaluationReport(
        cost_model=rules.cost_model,
        repositories=len({episode.repository for episode in episodes}),
        episodes=len(episodes),
        chunks=sum(len(episode.gains) for episode in episodes),
        seeds=tuple(seeds),
        results=tuple(results),
        comparisons=tuple(comparisons),
    )


def _method(row: dict[str, Any]) -> MethodResult:
    share = None if row["share"] is None else Interval(**row["share"])
    return MethodResult(**{**row, "gain": Interval(**row["gain"]), "share": share})


def _comparison(row: dict[str, Any]) -> Comparison:
    return Comparison(**{**row, "difference": Interval(**row["difference"])})
