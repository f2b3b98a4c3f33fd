"""`ponderttt train ablate`: what features are worth.

A feature is left out by dividing it by so much that nothing of it is left, in training and in the
evaluation alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ponderttt.adaptation.features import FEATURE_GROUPS, FEATURE_NAMES
from ponderttt.adaptation.policy import load_policy
from ponderttt.engine.config import served_name
from ponderttt.errors import InvalidRequestError
from training.analysis.report import evaluate
from training.analysis.schedules import Served
from training.gathering import trace_source
from training.learning import export_policy, fresh_network, load_traces, make_trainer, rules_of
from training.recipe import load_recipe

WHOLE = "all features"


def columns_of(name: str) -> list[int]:
    """Indices of a feature, or of a group of features.

    Raises:
        InvalidRequestError: there is none of that name.
    """
    names = FEATURE_GROUPS.get(name, (name,))
    if any(each not in FEATURE_NAMES for each in names):
        known = ", ".join((*FEATURE_GROUPS, *FEATURE_NAMES))
        raise InvalidRequestError("name", f"{name!r} is none of {known}")
    return [FEATURE_NAMES.index(each) for each in names]


def run_ablation(
    recipe_name: str,
    names: Sequence[str],
    traces: Sequence[Path],
    output: Path,
    iterations: int | None = None,
    *,
    progress: bool = True,
) -> str:
    """Train once with everything and once without each; writes ablation.json.

    Returns:
        A Markdown table: gain on the test set of every run, and what all features gain more.
    Raises:
        InvalidRequestError: an unknown name, no episode to train or to judge on, or the output
            cannot be written.
    """
    recipe = load_recipe(recipe_name)
    left_out: dict[str, list[int]] = {WHOLE: [], **{name: columns_of(name) for name in names}}
    recorded = load_traces(traces, recipe)
    rules = rules_of(recipe, recorded.costs)
    train, test = recorded.episodes["train"], recorded.episodes["test"]
    if not train or not test:
        raise InvalidRequestError("traces", "need episodes of train and of test")
    gates = {}
    for name, columns in left_out.items():
        network = fresh_network(recipe, train, recipe.ppo.seed, left_out=columns)
        source = trace_source(recipe, train, recorded.costs, recipe.ppo.seed)
        folder = output / name.replace(" ", "-")
        make_trainer(
            recipe, source, network, None, iterations=iterations or recipe.ppo.iterations,
            seed=recipe.ppo.seed, progress=progress,
        ).train()  # fmt: skip
        export_policy(network, recipe, folder, {"left_out": name}, {})
        gates[name] = Served(load_policy(folder, served_name(recipe.model)))
    report = evaluate(test, gates, rules, recipe.budgets, subject=WHOLE)
    try:
        (output / "ablation.json").write_text(report.to_json())
    except OSError as error:
        raise InvalidRequestError("output", f"{output} cannot be written: {error}") from error
    return report.to_markdown()
