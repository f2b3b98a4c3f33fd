"""`ponderttt train baseline`, also `python -m training.baseline`: one action for every chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ponderttt.adaptation.actions import Action
from ponderttt.errors import InvalidRequestError
from training.console import run


def baseline(
    action: Annotated[str, typer.Option(help="SKIP, UPDATE_1, UPDATE_2 or UPDATE_4.")],
    model_scale: Annotated[
        str,
        typer.Option(
            "--model-scale", "--model", help="Model: an embedded name, 125m, 350m, 1b, or a path."
        ),
    ] = "smollm2-135m",
    recipe: Annotated[
        str | None, typer.Option(help="A shipped recipe or a .json file; default: the model's.")
    ] = None,
    split: Annotated[str, typer.Option(help="Set of repositories: train, validation, test.")] = (
        "test"
    ),
    budget: Annotated[
        float | None,
        typer.Option(help="Highest mean cost, × forward; the ledger enforces it. Default: none."),
    ] = None,
    episodes: Annotated[
        int | None, typer.Option(min=1, help="Use the first episodes only.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Keep results here (JSON lines), and go on from there.")
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Let every session take one action on every chunk; print loss and cost per repository."""
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    from ponderttt.adaptation.params import check_budget
    from training.analysis.schedules import Fixed
    from training.evaluation import OFF
    from training.learning import rules_of
    from training.live import Method, play_live
    from training.live_results import by_repository, mean_costs
    from training.recipe import episodes_by_split, load_split, recipe_for
    from training.tracing import open_core, split_names

    if action not in Action.__members__:
        raise InvalidRequestError(
            "action", f"{action!r} is none of {', '.join(Action.__members__)}"
        )
    check_budget("budget", budget)
    (name,) = split_names([split])
    chosen = recipe_for(model_scale, recipe)
    core = open_core(chosen, device=device, slots=2)
    divided = load_split(chosen.corpora, progress=not quiet)
    found = episodes_by_split(divided, core.tokenizer, chosen.episodes)[name][:episodes]
    if not found:
        raise InvalidRequestError("split", f"{name} has no episode; choose another, or a recipe")
    methods = [
        Method(OFF, Fixed(Action.SKIP), None),
        Method(action, Fixed(Action[action]), budget),
    ]
    rules = rules_of(chosen, core.costs)
    total = 2 * sum(len(episode.chunks) for episode in found)
    with tqdm(total=total, unit=" chunks", disable=quiet) as bar:

        def advance(chunks: int) -> None:
            bar.update(chunks)

        results = play_live(core, found, methods, rules, output, progress=advance)
    learned = [result for result in results if result.method == action]
    off = by_repository([result for result in results if result.method == OFF])
    losses = by_repository(learned)
    table = Table("repository", "off", action, "change", title="loss, nats per token")
    for repository, loss in losses.items():
        change = loss / off[repository] - 1
        table.add_row(repository, f"{off[repository]:.4f}", f"{loss:.4f}", f"{change:+.2%}")
    Console().print(table)
    costs = [mean_costs(result, rules.costs) for result in learned]
    mean = {model: sum(cost[model] for cost in costs) / len(costs) for model in costs[0]}
    typer.echo(
        f"mean change {sum(losses[n] / off[n] - 1 for n in losses) / len(losses):+.2%}, "
        + ", ".join(f"{model} cost {cost:.2f}" for model, cost in mean.items())
    )


if __name__ == "__main__":
    run(baseline)
