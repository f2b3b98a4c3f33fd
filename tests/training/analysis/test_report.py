"""The evaluation: figures against sums by hand, JSON there and back, and the tables."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ponderttt.adaptation.actions import Action
from ponderttt.errors import InvalidRequestError
from tests.training.analysis.recorded import RULES, episode
from training.analysis.oracle import oracle
from training.analysis.outcomes import Outcome, compare, outcome_of, summarise, totals
from training.analysis.playing import Chooser, play
from training.analysis.report import EvaluationReport, ReportFormatError, evaluate
from training.analysis.schedules import THRESHOLD, Fixed, Random

EPISODES = [episode(12 + i, i, repository=f"r{i // 2}") for i in range(8)]
METHODS: dict[str, Chooser] = {"policy": THRESHOLD, "random": Random(), "SKIP": Fixed(Action.SKIP)}
BUDGETS, SEEDS = (1.5, 3.0), (0, 1, 2)


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    return evaluate(EPISODES, METHODS, RULES, BUDGETS, SEEDS)


def test_there_is_a_result_for_every_method_and_budget(report: EvaluationReport) -> None:
    names = [(result.budget, result.method) for result in report.results]
    assert names == [(b, m) for b in BUDGETS for m in (*METHODS, "oracle")]
    assert (report.repositories, report.episodes, report.chunks) == (4, 8, sum(range(12, 20)))
    assert report.result("random", 3.0).budget == 3.0
    with pytest.raises(InvalidRequestError, match="not played at a budget of 2"):
        report.result("random", 2.0)


def test_gains_are_means_over_repositories_and_seeds(report: EvaluationReport) -> None:
    found = report.result("random", 1.5)
    expected = {}
    for name in ("r0", "r1", "r2", "r3"):
        mine = [e for e in EPISODES if e.repository == name]
        nats = [sum(play(e, Random(), RULES, 1.5, seed).gain for e in mine) for seed in SEEDS]
        expected[name] = np.mean(nats) / sum(e.tokens.sum() for e in mine)
    assert found.repositories == pytest.approx(expected)
    assert found.gain.estimate == pytest.approx(np.mean(list(expected.values())))
    assert found.gain.low is not None
    assert found.gain.low < found.gain.estimate
    assert sum(found.actions.values()) == report.chunks * len(SEEDS)


def test_shares_are_of_the_oracle_under_the_same_budget(report: EvaluationReport) -> None:
    for budget in BUDGETS:
        ideal = sum(oracle(e, RULES, budget).played.gain for e in EPISODES)
        reached = sum(play(e, THRESHOLD, RULES, budget).gain for e in EPISODES)
        share = report.result("policy", budget).share
        assert share is not None
        assert share.estimate == pytest.approx(reached / ideal)
        ideal_share = report.result("oracle", budget).share
        assert ideal_share is not None
        assert (ideal_share.low, ideal_share.high) == pytest.approx((1.0, 1.0))
        assert report.result("SKIP", budget).gain.estimate == 0.0


def test_costs_are_means_over_chunks_not_over_episodes(report: EvaluationReport) -> None:
    found = report.result("policy", 3.0)
    taken = [a for e in EPISODES for a in play(e, THRESHOLD, RULES, 3.0).actions]
    for model, costs in RULES.costs.items():
        assert found.mean_cost[model] == pytest.approx(np.mean([costs[a] for a in taken]))
    assert found.mean_cost["nominal"] <= found.worst_window <= 3.0 + 1e-9


def test_the_policy_is_compared_with_all_but_the_oracle(report: EvaluationReport) -> None:
    assert [(c.budget, c.baseline) for c in report.comparisons] == [
        (b, m) for b in BUDGETS for m in ("random", "SKIP")
    ]
    for comparison in report.comparisons:
        mine = report.result("policy", comparison.budget).gain.estimate
        other = report.result(comparison.baseline, comparison.budget).gain.estimate
        assert comparison.difference.estimate == pytest.approx(mine - other)
        assert comparison.difference.n == 4


def test_a_report_comes_back_from_json(report: EvaluationReport) -> None:
    assert EvaluationReport.from_json(report.to_json()) == report


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seeds": [], "results": [{}]}', "null"])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ReportFormatError, match="not an evaluation report"):
        EvaluationReport.from_json(text)


def test_a_report_with_a_field_of_another_version_is_refused(report: EvaluationReport) -> None:
    values = json.loads(report.to_json())
    with pytest.raises(ReportFormatError, match="colour"):
        EvaluationReport.from_json(json.dumps({**values, "colour": "red"}))


def test_the_tables_have_a_row_per_result_and_a_cell_per_heading(report: EvaluationReport) -> None:
    methods, differences = report.to_markdown().split("\n\n")
    for table, rows in ((methods, report.results), (differences, report.comparisons)):
        lines = table.strip().splitlines()
        assert len(lines) == len(rows) + 2
        assert len({line.count("|") for line in lines}) == 1
    gain = report.result("policy", 1.5).gain
    assert gain.low is not None
    assert gain.high is not None
    cells = f"| {gain.estimate * 1000:.1f} ({gain.low * 1000:.1f} … {gain.high * 1000:.1f}) |"
    assert cells in methods.splitlines()[2]


def test_one_repository_gets_figures_without_intervals() -> None:
    found = evaluate(EPISODES[:2], METHODS, RULES, [2.0])
    result = found.result("random", 2.0)
    assert (result.gain.low, result.gain.n) == (None, 1)
    assert f"| {result.gain.estimate * 1000:.1f} |" in found.to_markdown()
    assert EvaluationReport.from_json(found.to_json()) == found


def outcome(repository: str = "r", tokens: int = 10, gain: float = 1.0) -> Outcome:
    return Outcome("m", 2.0, repository, gain, tokens, {"nominal": 1.0}, (Action.SKIP,), 1.0)


def test_without_an_oracle_or_anything_to_gain_there_is_no_share() -> None:
    assert summarise([outcome()]).share is None
    assert summarise([outcome(gain=-1.0)], [outcome(gain=0.0)]).share is None


def test_methods_on_different_repositories_cannot_be_set_against_each_other() -> None:
    one, other = summarise([outcome("a")]), summarise([outcome("b")])
    with pytest.raises(InvalidRequestError, match="other repositories"):
        compare(one, [other])
    with pytest.raises(InvalidRequestError, match="other repositories"):
        summarise([outcome("a")], [outcome("b")])


def test_a_longer_episode_weighs_more_within_its_repository() -> None:
    made = [outcome_of("m", 2.0, e, play(e, Fixed(Action.UPDATE_1), RULES, 2.0)) for e in EPISODES]
    found = totals(made)
    assert found.names == ("r0", "r1", "r2", "r3")
    assert found.gains.sum() == pytest.approx(sum(o.gain for o in made))
    assert found.tokens.sum() == sum(o.tokens for o in made)


def test_an_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="episodes"):
        evaluate([], METHODS, RULES, BUDGETS)
    with pytest.raises(InvalidRequestError, match="budgets"):
        evaluate(EPISODES, METHODS, RULES, [])
    with pytest.raises(InvalidRequestError, match="subject"):
        evaluate(EPISODES, {"SKIP": Fixed(Action.SKIP)}, RULES, BUDGETS)
    with pytest.raises(InvalidRequestError, match="has no token"):
        totals([outcome(tokens=0)])
    with pytest.raises(InvalidRequestError, match="outcomes"):
        summarise([])
