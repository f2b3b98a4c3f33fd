"""The methods that are compared, on recorded traces and on the live engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import cast

from tqdm import tqdm

from ponderttt.adaptation.actions import Action, CostModelName
from ponderttt.adaptation.gates import OffGate, ThresholdGate
from ponderttt.adaptation.policy import PolicyGate, load_policy, save_policy
from ponderttt.engine.config import served_name
from ponderttt.engine.core import EngineCore
from ponderttt.errors import InvalidRequestError
from training.analysis.gains import TraceEpisode
from training.analysis.outcomes import Comparison, MethodResult, Outcome, compare, summarise
from training.analysis.playing import Chooser, worst_window
from training.analysis.plots import plot_against_cost
from training.analysis.report import POLICY, EvaluationReport, evaluate
from training.analysis.schedules import FrontLoaded, PerBudget, Random, Served, best_fixed
from training.analysis.statistics import Interval
from training.environments.budgeted import BudgetRules
from training.learning import load_traces, rules_of
from training.live import Method, play_live
from training.live_results import LiveResult, mean_costs
from training.recipe import episodes_by_split, load_recipe, load_split
from training.rollouts.episodes import Episode
from training.tracing import open_core, split_names

OFF = "off"


def methods(
    train: Sequence[TraceEpisode],
    rules: BudgetRules,
    budgets: Sequence[float],
    policies: Mapping[str, PolicyGate],
) -> dict[str, Chooser]:
    """Policies and what they are compared with, by name.

    Args:
        train: chooses the best fixed schedule of each budget.
        rules: cost models.
        budgets: that are asked for.
        policies: by name.
    """
    fixed = {budget: best_fixed(train, rules, budget) for budget in budgets}
    return {
        **{name: Served(gate) for name, gate in policies.items()},
        "threshold": Served(ThresholdGate()),
        "random": Random(),
        "front-loaded": FrontLoaded(Action.UPDATE_1),
        "best fixed": PerBudget(fixed),
    }


def evaluate_live(
    core: EngineCore,
    episodes: Sequence[Episode],
    choosers: Mapping[str, Chooser],
    rules: BudgetRules,
    budgets: Sequence[float],
    output: Path,
    *,
    seed: int = 0,
    progress: bool = True,
) -> EvaluationReport:
    """Play all methods under all budgets on sessions that really learn.

    Args:
        core: its bank has a slot for every method and budget, and one for the session that never
            learns.
        episodes: held out.
        choosers: methods by name.
        rules: cost models.
        budgets: highest mean costs, × forward.
        output: JSON lines of results; an interrupted run is continued.
        seed: of the draws.
        progress: show a progress bar.
    """
    every = [
        Method(name, chooser, budget) for budget in budgets for name, chooser in choosers.items()
    ]
    played = [Method(OFF, Served(OffGate()), None), *every]
    total = len(played) * sum(len(episode.chunks) for episode in episodes)
    with tqdm(total=total, unit=" chunks", desc="live", disable=not progress) as bar:

        def advance(chunks: int) -> None:
            bar.update(chunks)

        results = play_live(core, episodes, played, rules, output, seed=seed, progress=advance)
    return live_report(results, rules, seed)


def live_report(
    results: Sequence[LiveResult], rules: BudgetRules, seed: int = 0, subject: str | None = POLICY
) -> EvaluationReport:
    """Sum up live results; gains are against the session that never learns."""
    off = {result.episode: sum(result.nats) for result in results if result.method == OFF}
    learned = [result for result in results if result.method != OFF]
    found: dict[float, dict[str, list[Outcome]]] = {}
    for result in learned:
        if result.budget is not None:
            outcome = _outcome(result, off[result.episode], rules)
            found.setdefault(result.budget, {}).setdefault(result.method, []).append(outcome)
    rows: list[MethodResult] = []
    comparisons: list[Comparison] = []
    for each in found.values():
        summed = {name: summarise(outcomes) for name, outcomes in each.items()}
        rows += list(summed.values())
        if subject in summed:
            others = [result for name, result in summed.items() if name != subject]
            comparisons += compare(summed[subject], others)
    base = [result for result in results if result.method == OFF]
    return EvaluationReport(
        cost_model=rules.cost_model,
        repositories=len({result.repository for result in base}),
        episodes=len(base),
        chunks=sum(len(result.actions) for result in base),
        seeds=(seed,),
        results=tuple(rows),
        comparisons=tuple(comparisons),
    )


def _outcome(result: LiveResult, off: float, rules: BudgetRules) -> Outcome:
    actions = [Action(action) for action in result.actions]
    return Outcome(
        method=result.method,
        budget=result.budget or 0.0,
        repository=result.repository,
        gain=off - sum(result.nats),
        tokens=sum(result.tokens),
        mean_cost=mean_costs(result, rules.costs),
        actions=actions,
        worst_window=worst_window([rules.cost(action) for action in actions]),
    )


def run_evaluation(
    recipe: str,
    output: Path,
    *,
    policy: Path | None,
    traces: Sequence[Path],
    live: bool,
    split: str,
    budgets: Sequence[float],
    limit: int | None,
    seed: int,
    device: str,
    progress: bool,
    record: bool = False,
    only: Sequence[str] = (),
) -> EvaluationReport:
    """What `ponderttt train evaluate` does; writes report.json, report.md and report.png.

    With `record`, the policy's own file states the figures as well; `only` names the methods that
    are played, where not all of them are wanted.

    Raises:
        InvalidRequestError: no policy, no such method, or no episode in the set.
    """
    chosen = load_recipe(recipe)
    (name,) = split_names([split])
    folder = policy or shipped_policy(chosen.model)
    gate = load_policy(folder, served_name(chosen.model))
    wanted = tuple(dict.fromkeys(budgets)) or chosen.budgets
    recorded = load_traces(traces, chosen) if traces else None
    if recorded is None:
        raise InvalidRequestError(
            "traces", "are needed to choose the best fixed schedule; give --traces"
        )
    rules = rules_of(chosen, recorded.costs)
    choosers = methods(recorded.episodes["train"], rules, wanted, {POLICY: gate})
    if unknown := sorted(set(only) - set(choosers)):
        raise InvalidRequestError("method", f"{unknown[0]!r} is none of {', '.join(choosers)}")
    choosers = {name: each for name, each in choosers.items() if not only or name in only}
    if live:
        slots = 1 + len(wanted) * len(choosers)
        core = open_core(chosen, device=device, slots=slots)
        divided = load_split(chosen.corpora, progress=progress)
        found = episodes_by_split(divided, core.tokenizer, chosen.episodes)[name][:limit]
        if not found:
            raise InvalidRequestError("split", f"{name} has no episode; choose another")
        report = evaluate_live(
            core, found, choosers, rules_of(chosen, core.costs), wanted,
            output / "live.jsonl", seed=seed, progress=progress,
        )  # fmt: skip
    else:
        episodes = recorded.episodes[name][:limit]
        if not episodes:
            raise InvalidRequestError("split", f"{name} has no episode in the traces")
        report = evaluate(episodes, choosers, rules, wanted, (seed, seed + 1, seed + 2))
    write_report(report, output)
    if record:
        record_report(report, folder, gate, f"{name}, {'live' if live else 'traces'}")
    return report


def record_report(report: EvaluationReport, folder: Path, gate: PolicyGate, title: str) -> None:
    """State a report's figures in `policy.json`, under a title; others stay."""
    figures = {
        "cost_model": report.cost_model,
        "repositories": report.repositories,
        "chunks": report.chunks,
        "unit": "nats saved per token; mean over repositories, 95% interval",
        "results": [
            {
                "method": result.method,
                "budget": result.budget,
                "gain": _rounded(result.gain),
                "share_of_oracle": result.share and _rounded(result.share),
                "mean_cost": {name: round(cost, 3) for name, cost in result.mean_cost.items()},
                "dearest_64_chunks": round(result.worst_window, 3),
            }
            for result in report.results
        ],
        "policy_minus": [
            {"method": c.baseline, "budget": c.budget, "gain": _rounded(c.difference)}
            for c in report.comparisons
        ],
    }
    evaluation = {**gate.metadata.evaluation, title: figures}
    try:
        save_policy(folder, gate.network, replace(gate.metadata, evaluation=evaluation))
    except OSError as error:
        raise InvalidRequestError("record", f"{folder} cannot be written: {error}") from error


def _rounded(value: Interval) -> list[float | None]:
    return [
        None if number is None else round(number, 5)
        for number in (value.estimate, value.low, value.high)
    ]


def write_report(report: EvaluationReport, output: Path) -> None:
    """report.json, report.md and report.png."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "report.json").write_text(report.to_json())
        (output / "report.md").write_text(report.to_markdown())
    except OSError as error:
        raise InvalidRequestError("output", f"{output} cannot be written: {error}") from error
    cost_model = cast(CostModelName, report.cost_model)
    budgets = sorted({result.budget for result in report.results})
    plot_against_cost(report.results, output / "report.png", cost_model, budgets)


def shipped_policy(model: str) -> Path:
    """Folder of the policy that comes with the project.

    Raises:
        InvalidRequestError: there is none for the model.
    """
    folder = Path(str(files("ponderttt"))) / "policies" / served_name(model)
    if not folder.is_dir():
        raise InvalidRequestError("policy", f"none is shipped for {model!r}; give --policy")
    return folder
