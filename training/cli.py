"""`ponderttt train`: from repositories to a policy, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ponderttt.adaptation.actions import Action, CostModelName
from ponderttt.errors import InvalidRequestError
from training.baseline import baseline
from training.policy import policy

app = typer.Typer(no_args_is_help=True, help="Train and evaluate policies.")

RecipeArgument = Annotated[
    str, typer.Argument(help="A shipped recipe (the model's name), or a .json file.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
TracesOption = Annotated[
    list[Path], typer.Option(help="Trace file from `ponderttt train collect`; may be repeated.")
]
DeviceOption = Annotated[str, typer.Option(help="Torch device.")]


@app.command("collect")
def collect(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option(help="Trace file; an existing one is continued.")],
    split: Annotated[
        list[str] | None, typer.Option(help="train, validation or test; default: all.")
    ] = None,
    device: DeviceOption = "cpu",
    quiet: QuietOption = False,
) -> None:
    """Record full-information traces. Safe to interrupt and repeat."""
    from training.recipe import load_recipe
    from training.tracing import collect_traces, open_core, split_names

    chosen = load_recipe(recipe)
    splits = split_names(split or ())
    core = open_core(chosen, device=device)
    collect_traces(chosen, core, output, splits, progress=not quiet)


app.command("policy")(policy)
app.command("baseline")(baseline)


@app.command("oracle")
def oracle_command(
    recipe: RecipeArgument,
    traces: TracesOption,
    budget: Annotated[float, typer.Option(help="Highest mean cost, × forward.")] = 2.0,
    split: Annotated[str, typer.Option(help="Set of repositories.")] = "test",
) -> None:
    """Best actions in hindsight on recorded traces: what no policy can exceed."""
    from rich.console import Console
    from rich.table import Table

    from training.analysis.oracle import oracle
    from training.learning import load_traces, rules_of
    from training.recipe import load_recipe
    from training.tracing import split_names

    chosen = load_recipe(recipe)
    recorded = load_traces(traces, chosen)
    rules = rules_of(chosen, recorded.costs)
    (name,) = split_names([split])
    if not recorded.episodes[name]:
        raise InvalidRequestError("split", f"{name} has no episode in the traces; choose another")
    table = Table("episode", "chunks", "gain, nats/token", "mean cost", "actions")
    for episode in recorded.episodes[name]:
        found = oracle(episode, rules, budget).played
        counts = " ".join(
            f"{action.name}:{found.actions.count(action)}"
            for action in Action
            if action in found.actions
        )
        table.add_row(
            episode.name,
            str(len(found.actions)),
            f"{found.gain / found.tokens:.4f}",
            f"{found.mean_cost[rules.cost_model]:.3f}",
            counts,
        )
    Console().print(table)


@app.command("evaluate")
def evaluate_command(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option(help="Folder for report.json, report.md, report.png.")],
    policy_folder: Annotated[
        Path | None,
        typer.Option("--policy", help="Policy folder; default: the one shipped for the model."),
    ] = None,
    traces: Annotated[
        list[Path] | None,
        typer.Option(help="Trace file: chooses the best fixed schedule; may be repeated."),
    ] = None,
    live: Annotated[
        bool, typer.Option(help="On sessions that really learn, not on the traces.")
    ] = False,
    split: Annotated[str, typer.Option(help="Set of repositories.")] = "test",
    budget: Annotated[
        list[float] | None, typer.Option(help="Mean cost asked for; repeat; default: the recipe's.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method; may be repeated. Default: all.")
    ] = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="The first episodes only.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    record: Annotated[
        bool, typer.Option("--record", help="State the figures in the policy's policy.json, too.")
    ] = False,
    device: DeviceOption = "cpu",
    quiet: QuietOption = False,
) -> None:
    """Compare a policy with random, fixed and threshold gates, and with the oracle."""
    from training.evaluation import run_evaluation

    report = run_evaluation(
        recipe,
        output,
        policy=policy_folder,
        traces=traces or (),
        live=live,
        split=split,
        budgets=tuple(budget or ()),
        limit=episodes,
        seed=seed,
        device=device,
        progress=not quiet,
        record=record,
        only=method or (),
    )
    typer.echo(report.to_markdown())


@app.command("ablate")
def ablate_command(
    recipe: RecipeArgument,
    name: Annotated[
        list[str],
        typer.Argument(help="Feature groups or features to leave out, one run for each."),
    ],
    traces: TracesOption,
    output: Annotated[Path, typer.Option(help="Folder for the runs and ablation.json.")],
    num_iterations: Annotated[
        int | None, typer.Option(min=1, help="PPO iterations; default: the recipe's.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Train without some features, and see what the policy loses."""
    from training.ablation import run_ablation

    typer.echo(run_ablation(recipe, name, traces, output, num_iterations, progress=not quiet))


@app.command("calibrate")
def calibrate_command(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option(help="Folder for trials.jsonl and calibration.json.")],
    budget: Annotated[
        float, typer.Option(help="Mean cost per chunk that every trial may spend.")
    ] = 1.5,
    cost_model: Annotated[
        CostModelName,
        typer.Option(help="The budget's; nominal where the machine is too busy to time anything."),
    ] = "measured",
    repositories: Annotated[
        int, typer.Option(min=1, help="Training repositories that are read.")
    ] = 6,
    chunks: Annotated[int, typer.Option(min=4, help="Chunks read of each repository.")] = 24,
    stage: Annotated[
        list[str] | None, typer.Option(help="Only these stages (names as printed).")
    ] = None,
    device: DeviceOption = "cpu",
    quiet: QuietOption = False,
) -> None:
    """Search what a gradient step should be for a model, on training repositories only."""
    from training.calibrate import run_calibration

    run_calibration(
        recipe,
        output,
        budget=budget,
        cost_model=cost_model,
        repositories=repositories,
        chunks=chunks,
        stages=stage or (),
        device=device,
        progress=not quiet,
    )
