"""`ponderttt train policy`, also `python -m training.policy`: train a policy and write it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ponderttt.errors import InvalidRequestError
from training.console import run


def policy(
    model_scale: Annotated[
        str,
        typer.Option(
            "--model-scale", "--model", help="Model: an embedded name, 125m, 350m, 1b, or a path."
        ),
    ] = "smollm2-135m",
    recipe: Annotated[
        str | None,
        typer.Option(help="A shipped recipe or a .json file; default: the model's."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for policy, checkpoints and logs.")] = Path(
        "runs/policy"
    ),
    traces: Annotated[
        list[Path] | None,
        typer.Option(
            help="Train on recorded traces (repeat for several files); without, on-policy on the "
            "live engine."
        ),
    ] = None,
    num_iterations: Annotated[
        int | None, typer.Option(min=1, help="PPO iterations; default: the recipe's.")
    ] = None,
    live_steps: Annotated[
        int, typer.Option(min=2, help="Steps of each live session per iteration.")
    ] = 8,
    init: Annotated[Path | None, typer.Option(help="Start from the policy in this folder.")] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Rollout processes (Ray); 1: in this process.")
    ] = 1,
    seed: Annotated[int | None, typer.Option(min=0, help="Default: the recipe's.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    device: Annotated[str, typer.Option(help="Torch device of live rollouts.")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train a policy with PPO under its budgets (PID-controlled Lagrange multipliers)."""
    from ponderttt.adaptation.policy import load_policy, read_metadata
    from training.gathering import engines_in, traces_in
    from training.learning import (
        export_policy,
        fresh_network,
        load_traces,
        make_trainer,
        network_from,
    )
    from training.ppo.network import ActorCritic
    from training.ppo.ray_source import RaySource
    from training.ppo.trainer import derived_seeds
    from training.recipe import recipe_for

    chosen = recipe_for(model_scale, recipe)
    number = chosen.ppo.seed if seed is None else seed
    provenance: dict[str, object] = {"source": "traces" if traces else "live"}
    if traces:
        recorded = load_traces(traces, chosen)
        if not recorded.episodes["train"]:
            raise InvalidRequestError("traces", "have no episode of the training set")
        network = fresh_network(chosen, recorded.episodes["train"], number)
        opened = traces_in(workers, chosen, recorded, number)
        provenance["trained_on"] = sorted(
            {episode.name.rpartition("#")[0] for episode in recorded.episodes["train"]}
        )
    else:
        chosen = replace(chosen, ppo=replace(chosen.ppo, num_steps=live_steps))
        network = ActorCritic(chosen.ppo.hidden_sizes, derived_seeds(number, 3)[0])
        opened = engines_in(workers, chosen, number, device, not quiet)
    if init is not None:
        network = network_from(load_policy(init, read_metadata(init).base_model), chosen, network)
    source = opened()
    try:
        trainer = make_trainer(
            chosen,
            source,
            network,
            output,
            iterations=num_iterations or chosen.ppo.iterations,
            seed=number,
            progress=not quiet,
        )
        if resume:
            trainer.resume()
        trainer.train()
    finally:
        if isinstance(source, RaySource):
            source.close()
    export_policy(
        network,
        chosen,
        output / "policy",
        {
            "command": " ".join(["ponderttt", "train", "policy", *_arguments()]),
            "seed": number,
            "iterations": trainer.iteration,
            "steps": trainer.steps,
            **provenance,
            "repositories": list(chosen.corpora.repositories),
            "held_out": list(chosen.corpora.held_out),
        },
        {},
    )
    typer.echo(output / "policy")


def _arguments() -> list[str]:
    arguments = sys.argv[1:]
    return arguments[2:] if arguments[:2] == ["train", "policy"] else arguments


if __name__ == "__main__":
    run(policy)
