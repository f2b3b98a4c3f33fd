"""From a recipe to a trace file: load the text, run the episodes, record."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from ponderttt.adaptation.actions import Action, CostModel
from ponderttt.adaptation.rules import UpdateRule
from ponderttt.engine.config import EngineConfig, TTTDefaults
from ponderttt.engine.core import EngineCore
from ponderttt.engine.loading import load_core
from ponderttt.errors import InvalidRequestError
from ponderttt.fast_weights.layout import LoRAConfig
from training.corpora import record
from training.recipe import SPLITS, Recipe, SplitName, episodes_by_split, load_split
from training.rollouts.collect import collect
from training.rollouts.episodes import Episode
from training.rollouts.traces import TraceHeader, TraceWriter

log = logging.getLogger(__name__)


def open_core(
    recipe: Recipe,
    *,
    device: str = "cpu",
    slots: int | None = None,
    lora: LoRAConfig | None = None,
    rule: UpdateRule | None = None,
    measure_costs: bool = False,
) -> EngineCore:
    """The engine that the recipe's episodes run on.

    Args:
        recipe: gives model, chunk size and lanes.
        device: a torch device.
        slots: of the bank; None: one for every lane, and one more.
        lora, rule: None: the model's calibrated ones.
        measure_costs: as in `EngineConfig`.
    """
    config = EngineConfig(
        adapter_slots=slots or recipe.collect.lanes + 1,
        lora=lora,
        rule=rule,
        measure_costs=measure_costs,
        ttt=TTTDefaults(gate="off", chunk_size=recipe.episodes.chunk_size),
    )
    return load_core(recipe.model, device=device, config=config)


def collect_traces(
    recipe: Recipe,
    core: EngineCore,
    output: Path,
    splits: Sequence[SplitName],
    *,
    cache: Path | None = None,
    progress: bool = True,
) -> None:
    """Record the episodes of some sets; what the file holds already is kept.

    The sets' episodes take turns, so that a collection stopped early has some of each. Beside
    the traces (`name.jsonl`), `name.corpora.json` states what was read.

    Args:
        recipe: what to collect.
        core: from `open_core`.
        output: trace file.
        splits: sets to record.
        cache: of the corpora.
        progress: show progress bars.
    Raises:
        InvalidRequestError: the corpus is empty, or the output cannot be written.
        TraceFormatError: the output belongs to another collection.
    """
    divided = load_split(recipe.corpora, cache, progress=progress)
    found = episodes_by_split(divided, core.tokenizer, recipe.episodes)
    chosen = {name: found[name] for name in splits}
    episodes = in_turns(list(chosen.values()))
    if not episodes:
        raise InvalidRequestError("splits", f"{', '.join(splits)}: no episode; choose others")
    total = sum(len(episode.chunks) for episode in episodes)
    try:
        writer = TraceWriter(output, header_of(recipe, core, chosen))
    except OSError as error:
        raise InvalidRequestError("output", f"{output} cannot be written: {error}") from error
    # Only now: beside the traces of another collection lies the record of that one.
    record.write(output.with_suffix(".corpora.json"), divided)
    with writer, tqdm(total=total, unit=" chunks", desc="traces", disable=not progress) as bar:

        def advance(chunks: int) -> None:
            bar.update(chunks)

        kept = len(writer.records)
        if kept:
            log.info("%s holds %d of %d chunks; going on from there", output, kept, total)
        collect(core, episodes, recipe.collect, writer, advance)


def header_of(
    recipe: Recipe, core: EngineCore, chosen: Mapping[SplitName, Sequence[Episode]]
) -> TraceHeader:
    """What the trace file states about itself."""
    config = recipe.collect
    return TraceHeader(
        base_model=core.model_name,
        chunk_size=recipe.episodes.chunk_size,
        peek_tokens=config.peek_tokens,
        behaviour=config.behaviour,
        seed=config.seed,
        settings={
            "lora": asdict(core.bank.layout.config),
            "rule": asdict(core.writer.rule),
            "episodes": asdict(recipe.episodes),
            "later_places": config.later_places,
            "costs": {name: _by_name(model) for name, model in core.costs.items()},
        },
        episodes={
            episode.name: {
                "repository": episode.repository,
                "split": name,
                "chunks": len(episode.chunks),
            }
            for name, episodes in chosen.items()
            for episode in episodes
        },
    )


def _by_name(costs: CostModel) -> dict[str, float]:
    return {action.name: float(costs[action]) for action in Action}


def in_turns(groups: Sequence[Sequence[Episode]]) -> list[Episode]:
    """One of each group after the other, in proportion to their sizes."""
    placed = [
        ((index + 0.5) / len(group), number, episode)
        for number, group in enumerate(groups)
        for index, episode in enumerate(group)
    ]
    return [episode for _, _, episode in sorted(placed, key=lambda each: each[:2])]


def split_names(names: Sequence[str]) -> tuple[SplitName, ...]:
    """Checked names of sets; none: all of them."""
    if unknown := sorted(set(names) - set(SPLITS)):
        raise InvalidRequestError("split", f"{unknown[0]!r} is none of {', '.join(SPLITS)}")
    return tuple(name for name in SPLITS if not names or name in names)
