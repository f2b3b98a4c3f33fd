"""Recipes: everything that a trained policy depends on, in one JSON file.

A recipe names its repositories by exact releases, so that whoever runs it reads the same text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ponderttt.adaptation.actions import CostModelName
from ponderttt.adaptation.params import check_budget
from ponderttt.errors import InvalidRequestError
from ponderttt.models.tokenizer import Tokenizer
from training.analysis.gains import RewardConfig
from training.corpora import languages, sources
from training.corpora.duplicates import THRESHOLD
from training.corpora.split import Split, split
from training.ppo.config import PPOConfig
from training.ppo.pid import PIDConfig
from training.rollouts.collect import CollectConfig
from training.rollouts.episodes import Episode, EpisodeConfig, make_episodes

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class CorporaConfig:
    """Which repositories, and how they are divided.

    Args:
        repositories: specs as for `training.corpora.sources.load`.
        held_out: names of those that form the test set.
        languages: of the documents.
        shares: of train and validation in the rest.
        seed: of the division.
        threshold: Jaccard similarity from which two documents are near-duplicates.
    """

    repositories: tuple[str, ...] = ("installed:*",)
    held_out: tuple[str, ...] = ()
    languages: tuple[str, ...] = languages.DEFAULT
    shares: tuple[float, float, float] = (0.7, 0.1, 0.2)
    seed: int = 0
    threshold: float = THRESHOLD


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to collect, and how to train on it.

    Args:
        model: as for `ponderttt serve --model`.
        corpora: which text.
        episodes: how repositories become sessions.
        collect: how traces are recorded.
        reward: what an action's gain is.
        budgets: mean costs that one policy learns to keep, and is judged under, × forward.
        practised: further budgets that it is trained under. Without a higher one a policy hardly
            meets a full account, and leaves part of its highest budget unspent.
        cost_model: in which they are counted.
        reward_scale: rewards are gains times this; brings them near 1.
        num_envs: episodes at once when training on traces.
        whole_share: share of them whose text comes in one request; see `TraceEnv`.
        ppo: the learner's settings.
        pid: the multipliers' settings.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    model: str
    corpora: CorporaConfig = field(default_factory=CorporaConfig)
    episodes: EpisodeConfig = field(default_factory=EpisodeConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    budgets: tuple[float, ...] = (1.5, 2.0, 3.0)
    practised: tuple[float, ...] = ()
    cost_model: CostModelName = "nominal"
    reward_scale: float = 1.0
    num_envs: int = 64
    whole_share: float = 1.0
    ppo: PPOConfig = field(default_factory=PPOConfig)
    pid: PIDConfig = field(default_factory=PIDConfig)

    def __post_init__(self) -> None:
        if not self.budgets or len(set(self.budgets)) < len(self.budgets):
            raise InvalidRequestError("budgets", f"{self.budgets}: give one or more, all different")
        if len(set(self.training_budgets)) < len(self.training_budgets):
            raise InvalidRequestError(
                "practised", f"{self.practised}: must differ from each other and from the budgets"
            )
        for budget in self.budgets:
            check_budget("budgets", budget)
        for budget in self.practised:
            check_budget("practised", budget)
        if not (math.isfinite(self.reward_scale) and self.reward_scale > 0):
            raise InvalidRequestError("reward_scale", f"{self.reward_scale} is not above 0")
        if self.num_envs < 1:
            raise InvalidRequestError("num_envs", f"{self.num_envs} is below 1")

    @property
    def training_budgets(self) -> tuple[float, ...]:
        """All that the policy is trained under."""
        return (*self.budgets, *self.practised)


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by its model's name, or one from a file.

    Raises:
        InvalidRequestError: there is none, or a field is wrong; says which.
    """
    path = Path(name).expanduser()
    shipped = _shipped()
    if path.suffix == ".json":
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InvalidRequestError("recipe", f"{path} cannot be read: {error}") from error
    elif name in shipped:
        text = shipped[name].read_text(encoding="utf-8")
    else:
        raise InvalidRequestError(
            "recipe", f"{name!r} is none of {', '.join(shipped)}; give one, or a .json file"
        )
    return parse_recipe(text, name)


def _shipped() -> dict[str, Traversable]:
    """Files by model, sorted."""
    found = files("training").joinpath("recipes").iterdir()
    return {
        each.name.removesuffix(".json"): each
        for each in sorted(found, key=lambda each: each.name)
        if each.name.endswith(".json")
    }


def recipe_for(model: str, name: str | None = None) -> Recipe:
    """The named recipe for a model; else its shipped one; else the defaults.

    Raises:
        InvalidRequestError: there is no such recipe, or it is wrong.
    """
    if name is not None:
        return load_recipe(name)
    return load_recipe(model) if model in _shipped() else Recipe(model)


def parse_recipe(text: str, name: str) -> Recipe:
    """A recipe from JSON; `name` is for messages.

    Raises:
        InvalidRequestError: it is no JSON, or a field is unknown, missing or out of range; says
            which.
    """
    try:
        return TypeAdapter(Recipe).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise InvalidRequestError("recipe", f"{name}: {where}: {first['msg']}") from error


def load_split(config: CorporaConfig, cache: Path | None = None, *, progress: bool = True) -> Split:
    """Load and divide the recipe's repositories; see `sources.load_all` and `split`."""
    repositories = sources.load_all(
        config.repositories, languages=config.languages, cache=cache, progress=progress
    )
    return split(
        repositories,
        seed=config.seed,
        shares=config.shares,
        held_out=config.held_out,
        threshold=config.threshold,
        progress=progress,
    )


def episodes_by_split(
    divided: Split, tokenizer: Tokenizer, config: EpisodeConfig
) -> dict[SplitName, list[Episode]]:
    """The episodes of each set.

    Raises:
        InvalidRequestError: the training set has none.
    """
    found: dict[SplitName, list[Episode]] = {
        name: make_episodes(getattr(divided, name), tokenizer, config) for name in SPLITS
    }
    if not found["train"]:
        raise InvalidRequestError(
            "corpora",
            "no repository of the training set is large enough for an episode of two chunks; "
            "add repositories, or lower least_tokens",
        )
    return found
