"""What a policy is made of, from recorded traces to a policy on disk."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ponderttt.adaptation.actions import NOMINAL, Action, CostModel
from ponderttt.adaptation.calibration import calibration_for
from ponderttt.adaptation.features import FEATURE_NAMES
from ponderttt.adaptation.policy import PolicyGate, PolicyMetadata, save_policy
from ponderttt.engine.config import served_name
from ponderttt.errors import InvalidRequestError
from training.analysis.gains import TraceEpisode, inside_gains, trace_episodes
from training.environments.budgeted import HISTORY_COLUMNS, BudgetRules
from training.ppo.network import ActorCritic
from training.ppo.normaliser import FeatureNormaliser
from training.ppo.pid import PIDController
from training.ppo.rollout import RolloutSource
from training.ppo.trainer import Trainer, derived_seeds
from training.recipe import Recipe, SplitName
from training.rollouts.traces import TraceFormatError, TraceHeader, read_traces

_LOG = logging.getLogger(__name__)

# A standard deviation that makes a feature 0.
_NOTHING_LEFT = 1e30


@dataclass(frozen=True, slots=True)
class TraceSet:
    """A trace file, by set.

    Args:
        header: of the file.
        episodes: those with records, by set.
        costs: cost models by name, the measured one as of when the traces were made.
    """

    header: TraceHeader
    episodes: Mapping[SplitName, Sequence[TraceEpisode]]
    costs: Mapping[str, CostModel]


def load_traces(paths: Path | Sequence[Path], recipe: Recipe) -> TraceSet:
    """Read the trace files of a recipe; several are taken together.

    Raises:
        TraceFormatError: one is damaged, was made for another model or chunk size, or with other
            settings than the first; or they hold nothing.
    """
    files = [paths] if isinstance(paths, Path) else list(paths)
    if not files:
        raise TraceFormatError("no trace file; run `ponderttt train collect` first")
    found: dict[SplitName, list[TraceEpisode]] = {"train": [], "validation": [], "test": []}
    headers: list[TraceHeader] = []
    seen: set[str] = set()
    read = [read_traces(path) for path in files]
    inside = inside_gains(read)
    for path, (header, records) in zip(files, read, strict=True):
        headers.append(header)
        for name, theirs, wanted in (
            ("base_model", header.base_model, served_name(recipe.model)),
            ("chunk_size", header.chunk_size, recipe.episodes.chunk_size),
            ("settings", header.settings, headers[0].settings),
        ):
            if theirs != wanted:
                raise TraceFormatError(
                    f"{path}: {name} is {theirs!r}, wanted {wanted!r}; give the recipe's traces"
                )
        for episode in trace_episodes(header, records, recipe.reward, inside):
            split = header.episodes.get(episode.name, {}).get("split")
            if split not in found:
                raise TraceFormatError(
                    f"{path}: {episode.name} is of no set of {', '.join(found)}; collect again"
                )
            if episode.name in seen:
                raise TraceFormatError(f"{path}: {episode.name} is in an earlier file, too")
            seen.add(episode.name)
            found[split].append(episode)
    _warn_if_outdated(files[0], headers[0])
    if not any(found.values()):
        raise TraceFormatError(f"{files[0]}: holds no record; run `ponderttt train collect` first")
    return TraceSet(headers[0], found, _costs(headers[0]))


def _warn_if_outdated(path: Path, header: TraceHeader) -> None:
    """Gains are those of the fast weights and the step that the traces were made with."""
    shipped = calibration_for(header.base_model).to_dict()
    for part in ("lora", "rule"):
        made = header.settings.get(part, {})
        for name, now in shipped[part].items():
            # How an update is judged hardly moves what it gains.
            if name in made and made[name] != now and name != "judge_share":
                _LOG.warning(
                    "%s: made with %s %r, and %s is served with %r; collect again, or name the "
                    "difference beside the policy's figures",
                    path, name, made[name], header.base_model, now,
                )  # fmt: skip


def _costs(header: TraceHeader) -> dict[str, CostModel]:
    # Missing in files that were not made by `ponderttt train collect`.
    kept = header.settings.get("costs", {}).get("measured", {})
    measured = {action: float(kept.get(action.name, NOMINAL[action])) for action in Action}
    return {"nominal": NOMINAL, "measured": CostModel("measured", measured)}


def rules_of(recipe: Recipe, costs: Mapping[str, CostModel]) -> BudgetRules:
    """The budgets that the recipe's policy is trained under."""
    return BudgetRules(recipe.training_budgets, costs, recipe.cost_model)


def fresh_network(
    recipe: Recipe, episodes: Sequence[TraceEpisode], seed: int, left_out: Sequence[int] = ()
) -> ActorCritic:
    """A network whose features are normalised by the mean and spread of recorded chunks.

    They stay as they are from the start on, so that what the policy has learned keeps its meaning.

    Args:
        recipe: gives the layers.
        episodes: of training.
        seed: of the weights.
        left_out: features that the policy must not see.
    """
    rows = np.concatenate([episode.features for episode in episodes])
    std = rows.std(axis=0)
    mean = rows.mean(axis=0)
    std = np.where(std > 1e-6, std, 1.0)
    # Under budgets these move far more than in the recorded sessions, which had none.
    mean[HISTORY_COLUMNS], std[HISTORY_COLUMNS] = 0.5, 0.5
    std[list(left_out)] = _NOTHING_LEFT
    normaliser = FeatureNormaliser(
        len(FEATURE_NAMES), mean.tolist(), std.tolist(), len(rows), frozen=True
    )
    return ActorCritic(recipe.ppo.hidden_sizes, derived_seeds(seed, 3)[0], normaliser)


def network_from(policy: PolicyGate, recipe: Recipe, base: ActorCritic) -> ActorCritic:
    """A policy as the start, maybe another model's.

    Features keep the normalisation that `base` was given for this model; without one, the policy's
    own is kept, which is what its weights were learned with.

    Raises:
        InvalidRequestError: its layers have other widths.
    """
    if policy.metadata.hidden_sizes != recipe.ppo.hidden_sizes:
        raise InvalidRequestError(
            "init",
            f"has layers {policy.metadata.hidden_sizes}, the recipe {recipe.ppo.hidden_sizes}",
        )
    base.policy.load_state_dict(policy.network.state_dict())
    if base.normaliser.empty:
        mean, std = policy.metadata.feature_mean, policy.metadata.feature_std
        base.normaliser = FeatureNormaliser(len(FEATURE_NAMES), mean, std, frozen=True)
    return base


def make_trainer(
    recipe: Recipe,
    source: RolloutSource,
    network: ActorCritic,
    output: Path | None,
    *,
    iterations: int,
    seed: int,
    progress: bool = True,
) -> Trainer:
    """PPO with one multiplier per budget.

    Args:
        recipe: settings.
        source: of rollouts under the recipe's training budgets.
        network: to train.
        output: as in `Trainer`.
        iterations, seed: instead of the recipe's.
        progress: show a progress bar.
    """
    config = replace(recipe.ppo, iterations=iterations, seed=seed)
    controller = PIDController(recipe.training_budgets, recipe.pid)
    return Trainer(source, config, controller, network=network, output=output, progress=progress)


def export_policy(
    network: ActorCritic,
    recipe: Recipe,
    directory: Path,
    training: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> PolicyMetadata:
    """Write the part of the network that is served, with its provenance and figures.

    Raises:
        InvalidRequestError: the directory cannot be written.
    """
    metadata = PolicyMetadata(
        base_model=served_name(recipe.model),
        chunk_size=recipe.episodes.chunk_size,
        cost_model=recipe.cost_model,
        budgets=recipe.training_budgets,
        feature_mean=network.normaliser.feature_mean,
        feature_std=network.normaliser.feature_std,
        hidden_sizes=network.hidden_sizes,
        training=dict(training),
        evaluation=dict(evaluation),
    )
    try:
        save_policy(directory, network.policy, metadata)
    except OSError as error:
        raise InvalidRequestError("output", f"{directory} cannot be written: {error}") from error
    return metadata
