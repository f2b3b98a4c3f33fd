"""`ponderttt train calibrate`: what one gradient step should be, found on training repositories.

One option is varied at a time, around the best found so far. All trials read the same text and may
spend the same: the budget is counted in the trial's own measured costs, so a configuration whose
step is twice as expensive may take half as many. (On a machine too busy to time anything it can be
counted in nominal costs: all trials then take as many steps.) Every trial learns as early as its
budget lets it, and is judged on the text that follows: each chunk is measured before it is learned.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import typer

from ponderttt.adaptation.actions import Action, CostModelName
from ponderttt.adaptation.calibration import Calibration
from ponderttt.errors import InvalidRequestError
from training.bench import Bench, TrialResult
from training.recipe import load_recipe, load_split
from training.rollouts.episodes import make_episodes
from training.tracing import open_core
from training.trials import Stage, Trial, default_stages, step_stages

log = logging.getLogger(__name__)


def search(
    bench: Bench,
    start: Trial,
    stages: Sequence[Stage],
    report: Callable[[TrialResult], None] = lambda result: None,
) -> tuple[Trial, list[TrialResult]]:
    """Vary one option after the other and keep what is best.

    Args:
        bench: runs the trials.
        start: the first best.
        stages: options.
        report: called with every result.
    Returns:
        The best trial that is safe, and all results in their order. Where none is safe, `start`.
    """
    best, results = start, [bench.run(start, "start")]
    report(results[0])
    score = results[0].relative if results[0].safe else math.inf
    for name, around in stages:
        found, found_score = best, score
        for change, trial in around(best):
            result = bench.run(trial, change)
            results.append(result)
            report(result)
            if result.safe and result.relative < found_score:
                found, found_score = trial, result.relative
        if found is not best:
            log.info("%s: %+.2f%% → %+.2f%%", name, 100 * score, 100 * found_score)
        best, score = found, found_score
    return best, results


def run_calibration(
    recipe_name: str,
    output: Path,
    *,
    budget: float,
    cost_model: CostModelName,
    repositories: int,
    chunks: int,
    stages: Sequence[str] = (),
    device: str = "cpu",
    progress: bool = True,
) -> Calibration:
    """What `ponderttt train calibrate` does; writes trials.jsonl and calibration.json.

    The shape and the rate are searched with UPDATE_1; how the rate falls over the steps of a write
    is searched with UPDATE_2 after that.

    Raises:
        InvalidRequestError: no such stage, no text, or the output cannot be written.
    """
    recipe = load_recipe(recipe_name)
    known = dict.fromkeys(name for name, _ in (*default_stages(1), *step_stages()))
    if unknown := sorted(set(stages) - set(known)):
        raise InvalidRequestError("stage", f"{unknown[0]!r} is none of {', '.join(known)}")
    core = open_core(recipe, device=device, slots=1)
    divided = load_split(recipe.corpora, progress=progress)
    config = replace(recipe.episodes, chunks=chunks)
    episodes = make_episodes(divided.train[:repositories], core.tokenizer, config)
    bench = Bench(core, episodes, budget, output / "trials.jsonl", cost_model)
    start = Trial(core.bank.layout.config, core.writer.rule, chunk_size=config.chunk_size)
    plans = [
        (Action.UPDATE_1, default_stages(core.model.config.num_layers)),
        (Action.UPDATE_2, step_stages()),
    ]
    best, results = start, list[TrialResult]()
    for action, each in plans:
        chosen = [stage for stage in each if not stages or stage[0] in stages]
        if chosen:
            best, more = search(bench, replace(best, action=action), chosen, _print)
            results += more
    figures = [
        {key: value for key, value in asdict(result).items() if key not in ("trial", "bench")}
        for result in results
    ]
    found = Calibration(
        best.lora,
        best.rule,
        {
            "model": core.model_name,
            "chunk_size": best.chunk_size,
            "command": f"ponderttt train calibrate {recipe_name} --budget {budget:g} "
            f"--cost-model {cost_model} --repositories {repositories} --chunks {chunks}"
            + "".join(f" --stage {shlex.quote(name)}" for name in stages),
            # The rule above is that of this trial; "start": nothing else was better without harm.
            "best": next(each.change for each in results if each.trial == best.to_dict()),
            "figures": figures,
        },
    )
    text = json.dumps(found.to_dict(), indent=2) + "\n"
    try:
        (output / "calibration.json").write_text(text)
    except OSError as error:
        raise InvalidRequestError("output", f"{output} cannot be written: {error}") from error
    return found


def _print(result: TrialResult) -> None:
    verdict = "" if result.safe else "  harms a repository"
    typer.echo(
        f"{result.trial['action']:9} {result.change:40} loss {result.loss:.4f} "
        f"({result.relative:+.2%}, worst {max(result.by_repository.values()):+.2%}) at measured "
        f"cost {result.measured_cost:.2f}, nominal {result.nominal_cost:.2f}{verdict}"
    )
