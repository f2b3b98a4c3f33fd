"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ponderttt.adaptation.policy import MAX_HIDDEN
from ponderttt.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class PPOConfig:
    """Settings of PPO (Schulman et al., arXiv:1707.06347); defaults in the usual range.

    Args:
        gamma: discount per step, for reward and for cost; 1 where episodes are sure to end.
        gae_lambda: trace decay of the advantages, for both.
        clip: the probability ratio's distance from 1 beyond which nothing is gained.
        entropy_coef: weight of the entropy bonus, nats against normalised advantages.
        entropy_decay: let that weight fall linearly to 0 over the iterations.
        value_coef, cost_value_coef: weights of the two value losses.
        epochs: passes over a rollout.
        minibatch_size: rows per optimiser step; the last of an epoch may be smaller.
        target_kl: approximate KL from the rollout's policy, nats, at which a rollout has been
            learned from enough; None: never.
        learning_rate: of Adam.
        learning_rate_decay: let it fall linearly to 0 over the iterations.
        max_grad_norm: the gradient's norm is cut down to this.
        num_steps: steps of each environment per rollout.
        iterations: rollouts in all.
        seed: of the network, of sampled actions and of the minibatches' order.
        hidden_sizes: widths of the trunk's tanh layers.
    Raises:
        InvalidRequestError: a value is out of range.
    """

    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy_coef: float = 0.01
    entropy_decay: bool = False
    value_coef: float = 0.5
    cost_value_coef: float = 0.5
    epochs: int = 4
    minibatch_size: int = 256
    target_kl: float | None = 0.02
    learning_rate: float = 3e-4
    learning_rate_decay: bool = False
    max_grad_norm: float = 0.5
    num_steps: int = 64
    iterations: int = 100
    seed: int = 0
    hidden_sizes: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        for name in ("gamma", "gae_lambda"):
            within(name, getattr(self, name), 0.0, 1.0)
        for name in ("entropy_coef", "value_coef", "cost_value_coef"):
            within(name, getattr(self, name), 0.0)
        for name in ("clip", "learning_rate", "max_grad_norm"):
            above(name, getattr(self, name), 0.0)
        if self.target_kl is not None:
            above("target_kl", self.target_kl, 0.0)
        for name in ("epochs", "minibatch_size", "num_steps", "iterations"):
            whole(name, getattr(self, name), 1)
        whole("seed", self.seed, 0)
        if not isinstance(self.hidden_sizes, tuple):
            raise InvalidRequestError("hidden_sizes", "must be a tuple of layer widths")
        for size in self.hidden_sizes:
            whole("hidden_sizes", size, 1, MAX_HIDDEN)

    def remaining(self, iteration: int) -> float:
        """Share of the run that is left at the start of an iteration: 1 at first, never 0."""
        return max(1.0 - iteration / self.iterations, 1.0 / self.iterations)

    def learning_rate_at(self, iteration: int) -> float:
        """The learning rate of an iteration."""
        return self.learning_rate * (self.remaining(iteration) if self.learning_rate_decay else 1.0)

    def entropy_coef_at(self, iteration: int) -> float:
        """The entropy bonus's weight in an iteration."""
        return self.entropy_coef * (self.remaining(iteration) if self.entropy_decay else 1.0)


def within(param: str, value: object, low: float, high: float = math.inf) -> None:
    """Raise InvalidRequestError unless `value` is a finite number in [low, high]."""
    if not low <= _number(param, value) <= high:
        raise InvalidRequestError(param, f"{value!r} lies outside [{low:g}, {high:g}]")


def above(param: str, value: object, low: float) -> None:
    """Raise InvalidRequestError unless `value` is a finite number above `low`."""
    if not _number(param, value) > low:
        raise InvalidRequestError(param, f"{value!r} must be above {low:g}")


def whole(param: str, value: object, low: int, high: float = math.inf) -> None:
    """Raise InvalidRequestError unless `value` is a whole number in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequestError(param, f"{value!r} is not a whole number")
    within(param, value, low, high)


def _number(param: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise InvalidRequestError(param, f"{value!r} is not a finite number")
    return value
