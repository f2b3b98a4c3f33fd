"""Methods compared, on traces and on the live engine."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ponderttt.adaptation.actions import NOMINAL, Action
from ponderttt.adaptation.policy import WEIGHTS_FILE, load_policy, read_metadata
from ponderttt.engine.core import EngineCore
from ponderttt.errors import InvalidRequestError
from training.analysis.report import EvaluationReport
from training.cli import app
from training.environments.budgeted import BudgetRules
from training.evaluation import live_report, methods, shipped_policy
from training.learning import export_policy, fresh_network, load_traces, rules_of
from training.live_results import LiveResult, read_results
from training.recipe import Recipe

RULES = BudgetRules((2.0, 3.0), {"nominal": NOMINAL, "measured": NOMINAL})


def result(
    repository: str, method: str, budget: float | None, nats: float, actions: tuple[int, ...]
) -> LiveResult:
    """Four chunks of 10 tokens."""
    return LiveResult(
        f"{repository}#0", repository, method, budget, (nats / 4,) * 4, (10,) * 4, actions, 0, ""
    )


def test_gains_of_live_results_are_what_learning_saved_per_token() -> None:
    update, skip = (1, 0, 1, 0), (0, 0, 0, 0)
    found = live_report(
        [
            result("a", "off", None, 80.0, skip),
            result("b", "off", None, 60.0, skip),
            result("a", "policy", 2.0, 72.0, update),
            result("b", "policy", 2.0, 58.0, (3, 0, 0, 0)),
            result("a", "random", 2.0, 76.0, update),
            result("b", "random", 2.0, 62.0, update),
            result("a", "policy", 3.0, 60.0, update),
            result("b", "policy", 3.0, 60.0, update),
        ],
        RULES,
        seed=5,
    )
    policy, random = found.result("policy", 2.0), found.result("random", 2.0)
    assert policy.repositories == {"a": pytest.approx(8 / 40), "b": pytest.approx(2 / 40)}
    assert policy.gain.estimate == pytest.approx((8 / 40 + 2 / 40) / 2)
    assert random.gain.estimate == pytest.approx((4 / 40 - 2 / 40) / 2)
    assert found.result("policy", 3.0).gain.estimate == pytest.approx(20 / 40 / 2)
    assert policy.mean_cost["nominal"] == pytest.approx(np.mean([2.0, 15 / 4]))
    assert policy.worst_window == pytest.approx(15 / 4)
    assert policy.actions == {"SKIP": 5, "UPDATE_1": 2, "UPDATE_2": 0, "UPDATE_4": 1}
    assert policy.share is None
    (comparison,) = found.comparisons
    assert (comparison.method, comparison.baseline, comparison.budget) == ("policy", "random", 2.0)
    assert comparison.difference.estimate == pytest.approx((4 / 40 + 4 / 40) / 2)
    assert (found.repositories, found.episodes, found.chunks, found.seeds) == (2, 2, 8, (5,))
    assert EvaluationReport.from_json(found.to_json()) == found


@pytest.fixture(scope="module")
def policy_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Recipe, tiny_traces: Path
) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    recorded = load_traces(tiny_traces, tiny_recipe)
    network = fresh_network(tiny_recipe, recorded.episodes["train"], 0)
    export_policy(network, tiny_recipe, folder, {}, {})
    return folder


def test_methods_are_the_policies_and_four_that_learned_nothing(
    tiny_recipe: Recipe, tiny_traces: Path, policy_folder: Path, tiny_core: EngineCore
) -> None:
    recorded = load_traces(tiny_traces, tiny_recipe)
    gate = load_policy(policy_folder, tiny_core.model_name)
    rules = rules_of(tiny_recipe, recorded.costs)
    found = methods(recorded.episodes["train"], rules, (1.5, 2.0), {"mine": gate})
    assert list(found) == ["mine", "threshold", "random", "front-loaded", "best fixed"]


def evaluate(recipe: Path, output: Path, *options: object) -> EvaluationReport:
    arguments = ["evaluate", recipe, "--output", output, "--quiet", *options]
    done = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    table = (output / "report.md").read_text()
    assert "policy" in table
    assert table.strip() in done.output
    return EvaluationReport.from_json((output / "report.json").read_text())


def test_evaluate_on_traces_writes_a_report(
    tiny_recipe_file: Path, tiny_traces: Path, policy_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "folder"
    found = evaluate(tiny_recipe_file, output, "--policy", policy_folder, "--traces", tiny_traces)
    assert {(each.method, each.budget) for each in found.results} == {
        (name, budget)
        for budget in (1.5, 3.0)
        for name in ("policy", "threshold", "random", "front-loaded", "best fixed", "oracle")
    }
    assert (found.repositories, found.episodes, found.seeds) == (2, 2, (0, 1, 2))
    for each in found.results:
        assert each.mean_cost["nominal"] <= each.budget + 1e-9


def test_evaluate_live_plays_every_method_and_recalls_what_it_played(
    tiny_recipe_file: Path, tiny_traces: Path, policy_folder: Path, tmp_path: Path
) -> None:
    options = (
        "--policy", policy_folder, "--traces", tiny_traces, "--live", "--budget", 2.0,
        "--budget", 2.0, "--episodes", 1, "--seed", 3,
    )  # fmt: skip
    found = evaluate(tiny_recipe_file, tmp_path, *options)
    assert [each.method for each in found.results] == [
        "policy", "threshold", "random", "front-loaded", "best fixed",
    ]  # fmt: skip
    assert (found.episodes, found.seeds) == (1, (3,))
    played = read_results(tmp_path / "live.jsonl")
    assert {each.method for each in played} == {"off", *(each.method for each in found.results)}
    off = next(each for each in played if each.method == "off")
    for each in played:
        if each.budget is not None:
            gain = (sum(off.nats) - sum(each.nats)) / sum(off.tokens)
            assert found.result(each.method, 2.0).gain.estimate == pytest.approx(gain)
            assert np.mean([NOMINAL[Action(action)] for action in each.actions]) <= 2.0
    before = (tmp_path / "live.jsonl").read_bytes()
    assert evaluate(tiny_recipe_file, tmp_path, *options) == found
    assert (tmp_path / "live.jsonl").read_bytes() == before


def test_evaluate_plays_only_the_methods_that_are_named(
    tiny_recipe_file: Path, tiny_traces: Path, policy_folder: Path, tmp_path: Path
) -> None:
    found = evaluate(
        tiny_recipe_file, tmp_path, "--policy", policy_folder, "--traces", tiny_traces, "--live",
        "--budget", 2.0, "--episodes", 1, "--method", "policy", "--method", "front-loaded",
    )  # fmt: skip
    assert [each.method for each in found.results] == ["policy", "front-loaded"]
    played = read_results(tmp_path / "live.jsonl")
    assert {each.method for each in played} == {"off", "policy", "front-loaded"}


def test_recorded_figures_stay_with_the_policy_which_decides_as_before(
    tiny_recipe_file: Path, tiny_traces: Path, policy_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(policy_folder, tmp_path / "policy")
    options = ("--policy", folder, "--traces", tiny_traces, "--record")
    found = evaluate(tiny_recipe_file, tmp_path / "a", *options)
    evaluate(tiny_recipe_file, tmp_path / "b", *options, "--split", "train")
    before, after = read_metadata(policy_folder), read_metadata(folder)
    assert list(after.evaluation) == ["test, traces", "train, traces"]
    rows = after.evaluation["test, traces"]["results"]
    expected = found.result("policy", 1.5).gain.estimate
    assert rows[0]["method"] == "policy"
    assert rows[0]["budget"] == 1.5
    assert rows[0]["gain"][0] == pytest.approx(expected, abs=1e-5)
    assert replace(after, evaluation=before.evaluation) == before
    assert (folder / WEIGHTS_FILE).read_bytes() == (policy_folder / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "dev"], "'dev' is none of"),
        (["--policy", "POLICY"], "traces: are needed"),
        (["--traces", "TRACES"], "policy: none is shipped"),
        (["--policy", "POLICY", "--traces", "TRACES", "--budget", "0.5"], "lies outside"),
        (["--policy", "POLICY", "--traces", "TRACES", "--method", "luck"], "'luck' is none of"),
        (["--policy", "POLICY", "--traces", "/nowhere"], "cannot be read"),
        (["--policy", "/nowhere", "--traces", "TRACES"], "cannot be read"),
        (["--policy", "POLICY", "--traces", "TRACES", "--output", "/dev/null/x"], "output"),
    ],
)
def test_bad_input_to_evaluate_is_refused(
    tiny_recipe_file: Path, tiny_traces: Path, policy_folder: Path, tmp_path: Path,
    options: list[str], message: str,
) -> None:  # fmt: skip
    places = {"POLICY": str(policy_folder), "TRACES": str(tiny_traces)}
    arguments = ["evaluate", str(tiny_recipe_file), "--output", str(tmp_path), "--quiet"]
    arguments += [places.get(each, each) for each in options]
    done = CliRunner().invoke(app, arguments)
    assert message in str(done.exception)
    assert not (tmp_path / "report.json").exists()


def test_a_policy_that_is_not_shipped_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="policy: none is shipped for 'x'; give --policy"):
        shipped_policy("x")


def test_the_report_of_live_results_is_readable_json(tmp_path: Path) -> None:
    skip = (0, 0, 0, 0)
    found = live_report([result("a", "off", None, 80.0, skip)], RULES)
    assert json.loads(found.to_json())["results"] == []
