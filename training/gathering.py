"""Where a policy's rollouts come from: traces or the engine, in this process or in several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from ponderttt.adaptation.actions import CostModel
from ponderttt.engine.core import EngineCore
from ponderttt.errors import InvalidRequestError
from training.analysis.gains import TraceEpisode
from training.analysis.smoothing import smoothed
from training.environments.live_env import LiveEnv
from training.environments.trace_env import TraceEnv
from training.learning import TraceSet, rules_of
from training.ppo.ray_source import Factory, RaySource
from training.ppo.rollout import InProcessSource, RolloutSource
from training.ppo.trainer import derived_seeds
from training.recipe import Recipe, episodes_by_split, load_split
from training.rollouts.episodes import Episode
from training.tracing import open_core

# The trainer has the first three derived seeds, the source the next two.
_SEEDS = 5


def trace_source(
    recipe: Recipe, episodes: Sequence[TraceEpisode], costs: Mapping[str, CostModel], seed: int
) -> RolloutSource:
    """Rollouts on recorded episodes."""
    if recipe.reward.smooth:
        episodes = smoothed(episodes, recipe.reward, recipe.episodes.chunk_size)
    env_seed, action_seed = derived_seeds(seed, _SEEDS)[3:]
    env = TraceEnv(
        episodes,
        rules_of(recipe, costs),
        recipe.num_envs,
        reward_scale=recipe.reward_scale,
        whole_share=recipe.whole_share,
        seed=env_seed,
    )
    return InProcessSource(env, recipe.ppo.num_steps, recipe.ppo.hidden_sizes, action_seed)


def live_source(
    recipe: Recipe, core: EngineCore, episodes: Sequence[Episode], seed: int
) -> RolloutSource:
    """Rollouts on the engine: every session really learns."""
    env_seed, action_seed = derived_seeds(seed, _SEEDS)[3:]
    env = LiveEnv(
        core,
        episodes,
        rules_of(recipe, core.costs),
        recipe.collect.lanes,
        reward_scale=recipe.reward_scale,
        seed=env_seed,
    )
    return InProcessSource(env, recipe.ppo.num_steps, recipe.ppo.hidden_sizes, action_seed)


def traces_in(
    workers: int, recipe: Recipe, recorded: TraceSet, seed: int
) -> Callable[[], RolloutSource]:
    """Opens the source of a run on traces; the workers share the recipe's environments.

    Raises:
        InvalidRequestError: more workers than environments.
    """
    if workers > recipe.num_envs:
        raise InvalidRequestError(
            "workers", f"{workers} for {recipe.num_envs} environments (num_envs); give fewer"
        )
    episodes, costs = recorded.episodes["train"], recorded.costs
    shares = [recipe.num_envs // workers + (n < recipe.num_envs % workers) for n in range(workers)]
    factories: list[Factory] = [
        partial(trace_source, replace(recipe, num_envs=share), episodes, costs, one)
        for share, one in zip(shares, _seeds(workers, seed), strict=True)
    ]
    return partial(_open, factories)


def engines_in(
    workers: int, recipe: Recipe, seed: int, device: str, progress: bool
) -> Callable[[], RolloutSource]:
    """Opens the source of a run on the engine; every worker has its own, with all its lanes."""
    shown = progress and workers == 1
    factories: list[Factory] = [
        partial(_engine, recipe, device, shown, one) for one in _seeds(workers, seed)
    ]
    return partial(_open, factories)


def _engine(recipe: Recipe, device: str, progress: bool, seed: int) -> RolloutSource:
    core = open_core(recipe, device=device)
    divided = load_split(recipe.corpora, progress=progress)
    episodes = episodes_by_split(divided, core.tokenizer, recipe.episodes)["train"]
    return live_source(recipe, core, episodes, seed)


def _seeds(workers: int, seed: int) -> list[int]:
    return [seed] if workers == 1 else derived_seeds(seed, _SEEDS + workers)[_SEEDS:]


def _open(factories: Sequence[Factory]) -> RolloutSource:
    return RaySource(factories) if len(factories) > 1 else factories[0]()
