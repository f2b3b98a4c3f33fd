"""The actor-critic: the network that is shipped, and two value heads on its trunk."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.features import FEATURE_NAMES
from ponderttt.adaptation.policy import PolicyNetwork
from training.ppo.categorical import masked_log_probs
from training.ppo.normaliser import FeatureNormaliser

NUM_FEATURES, NUM_ACTIONS = len(FEATURE_NAMES), len(Action)
_TANH_GAIN = nn.init.calculate_gain("tanh")
# Almost the same probability for every action at first.
_ACTOR_GAIN = 0.01
# Share of the old value statistics that stays per rollout.
_VALUE_DECAY = 0.9


class ValueHead(nn.Module):
    """A linear value head whose output is scaled by the returns' mean and standard deviation.

    Costs sum up to hundreds where rewards are hundredths of a nat; so scaled, both losses weigh the
    same on the shared trunk. When the scale moves, the weights are corrected so that the output
    does not (PopArt; van Hasselt et al., arXiv:1602.07714, section 2.2).

    Args:
        width: of the trunk's output.
    """

    mean: Tensor
    std: Tensor
    started: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        # A layer's own initialisation draws from the global generator, except on this device.
        with torch.device("meta"):
            linear = nn.Linear(width, 1)
        self.linear = linear.to_empty(device="cpu")
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.register_buffer("started", torch.tensor(False))

    def scaled(self, hidden: Tensor) -> Tensor:
        """[..., H] → [...] in standard deviations from the mean return."""
        value: Tensor = self.linear(hidden)[..., 0]
        return value

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] → [...] in the units of the returns."""
        return self.scaled(hidden) * self.std + self.mean

    def scale(self, returns: Tensor) -> Tensor:
        """Returns as `scaled` should give them."""
        return (returns - self.mean) / self.std

    @torch.no_grad()
    def absorb(self, returns: Tensor) -> None:
        """Let one rollout's returns move the scale."""
        mean, std = returns.mean(), returns.std(correction=0)
        if self.started:
            mean = _VALUE_DECAY * self.mean + (1.0 - _VALUE_DECAY) * mean
            std = _VALUE_DECAY * self.std + (1.0 - _VALUE_DECAY) * std
        # Returns that are all equal need a scale, too.
        std = std.clamp_min(max(1e-3 * abs(float(mean)), 1e-6))
        if self.started:
            self.linear.weight.mul_(self.std / std)
            self.linear.bias.mul_(self.std).add_(self.mean - mean).div_(std)
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.started.fill_(True)


class Evaluation(NamedTuple):
    """What the network makes of B rows.

    Args:
        log_probs: [B, A], -inf where not allowed.
        hidden: [B, H], the trunk's output, for the value heads.
    """

    log_probs: Tensor
    hidden: Tensor


class ActorCritic(nn.Module):
    """Policy and both values on one trunk.

    `policy`, with the normaliser's `feature_mean` and `feature_std`, is all that is shipped. The
    start is orthogonal with gain 5/3 in the trunk and 0.01 in the actor, from a generator of its
    own (torch's global one is not touched), and zero in the value heads, whose unit is not known
    yet.

    Args:
        hidden_sizes: widths of the trunk's layers.
        seed: of the weights.
        normaliser: of the 32 features; default: one that learns them.
    """

    def __init__(
        self,
        hidden_sizes: tuple[int, ...],
        seed: int = 0,
        normaliser: FeatureNormaliser | None = None,
    ) -> None:
        super().__init__()
        self.hidden_sizes = hidden_sizes
        with torch.device("meta"):
            policy = PolicyNetwork(hidden_sizes)
        self.policy = policy.to_empty(device="cpu")
        width = self.policy.actor.in_features
        self.value_reward, self.value_cost = ValueHead(width), ValueHead(width)
        self.normaliser = normaliser or FeatureNormaliser(NUM_FEATURES)
        self._initialise(torch.Generator().manual_seed(seed))

    def _initialise(self, generator: torch.Generator) -> None:
        gains: list[tuple[nn.Module, float]] = [(layer, _TANH_GAIN) for layer in self.policy.trunk]
        gains += [(self.policy.actor, _ACTOR_GAIN)]
        for layer, gain in gains:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, gain, generator)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor, allowed: Tensor) -> Evaluation:
        """[B, 32] raw features and [B, 4] bool → log-probabilities and the trunk's output."""
        hidden = self.policy.trunk(self.normaliser(features))
        return Evaluation(masked_log_probs(self.policy.actor(hidden), allowed), hidden)

    def values(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[..., 32] raw features → value of reward and of cost, each [...]."""
        hidden = self.policy.trunk(self.normaliser(features))
        return self.value_reward(hidden), self.value_cost(hidden)
