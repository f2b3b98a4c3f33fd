"""One PPO update from one rollout, with the multipliers acting on the advantages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ponderttt.errors import InvalidRequestError
from training.ppo.categorical import entropy, log_prob_of
from training.ppo.config import PPOConfig
from training.ppo.environment import State
from training.ppo.gae import gae
from training.ppo.network import ActorCritic, ValueHead
from training.ppo.objective import (
    approximate_kl,
    clipped_loss,
    constrained_advantages,
    explained_variance,
    normalise_by_budget,
)
from training.ppo.rollout import RolloutBatch


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """How an update went; means over its minibatches where nothing else is said.

    Args:
        policy_loss, value_loss_reward, value_loss_cost: the losses, value losses in scaled units.
        entropy: nats.
        approx_kl: from the rollout's policy, nats.
        clip_fraction: share of rows whose ratio lay outside the clip range.
        gradient_norm: before it is cut down.
        explained_variance_reward, explained_variance_cost: of the returns by the values before the
            update; None where all returns were equal.
        learning_rate, entropy_coef: in this iteration.
        optimiser_steps: taken.
        stopped_early: whether `target_kl` ended the update.
    """

    policy_loss: float
    value_loss_reward: float
    value_loss_cost: float
    entropy: float
    approx_kl: float
    clip_fraction: float
    gradient_norm: float
    explained_variance_reward: float | None
    explained_variance_cost: float | None
    learning_rate: float
    entropy_coef: float
    optimiser_steps: int
    stopped_early: bool


@dataclass(frozen=True, slots=True)
class _Rows:
    """A rollout's rows, flattened to [B, …], as the losses need them."""

    features: Tensor
    allowed: Tensor
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns_reward: Tensor
    returns_cost: Tensor

    def pick(self, index: Tensor) -> _Rows:
        return _Rows(*(getattr(self, name)[index] for name in self.__slots__))


class Learner:
    """Adam on the actor-critic.

    The value losses are not clipped: that was found to help nowhere (Andrychowicz et al.,
    arXiv:2006.05990, section 3.2).

    Args:
        network: is trained in place.
        config: settings.
        seed: of the minibatches' order.
    """

    def __init__(self, network: ActorCritic, config: PPOConfig, seed: int) -> None:
        self.network = network
        self.config = config
        self._generator = torch.Generator().manual_seed(seed)
        self._optimiser = torch.optim.Adam(network.parameters(), config.learning_rate, eps=1e-5)

    def update(self, batch: RolloutBatch, multipliers: Tensor, iteration: int) -> UpdateStats:
        """Learn from one rollout.

        Args:
            batch: gathered under the network as it is now.
            multipliers: [K] float32.
            iteration: for the settings that decay.
        Raises:
            InvalidRequestError: the loss is not finite.
        """
        config = self.config
        rows, explained = self._prepare(batch, multipliers)
        for group in self._optimiser.param_groups:
            group["lr"] = config.learning_rate_at(iteration)
        entropy_coef = config.entropy_coef_at(iteration)
        history: list[list[float]] = []
        kls: list[float] = []
        stopped = False
        for index in self._minibatches(len(rows.actions)):
            loss, figures, kl = self._loss(rows.pick(index), entropy_coef)
            kls.append(kl)
            # The first step is always taken, so that no rollout is wasted.
            if config.target_kl is not None and kl > config.target_kl and history:
                stopped = True
                break
            history.append([*figures, self._descend(loss)])
        means = torch.tensor(history, dtype=torch.float64).mean(0).tolist()
        return UpdateStats(
            policy_loss=means[0],
            value_loss_reward=means[1],
            value_loss_cost=means[2],
            entropy=means[3],
            approx_kl=sum(kls) / len(kls),
            clip_fraction=means[4],
            gradient_norm=means[5],
            explained_variance_reward=explained[0],
            explained_variance_cost=explained[1],
            learning_rate=config.learning_rate_at(iteration),
            entropy_coef=entropy_coef,
            optimiser_steps=len(history),
            stopped_early=stopped,
        )

    @torch.no_grad()
    def _prepare(
        self, batch: RolloutBatch, multipliers: Tensor
    ) -> tuple[_Rows, list[float | None]]:
        """Advantages and returns; and how much of the returns the values explained."""
        values = self.network.values(batch.features)
        next_values = self.network.values(batch.next_features)
        config = self.config
        advantages, returns, explained = [], [], []
        for signal, value, after in zip(
            (batch.rewards, batch.costs), values, next_values, strict=True
        ):
            after = after.masked_fill(batch.terminated, 0.0)
            found = gae(signal, value, after, batch.done, config.gamma, config.gae_lambda)
            advantages.append(found[0])
            returns.append(found[1])
            explained.append(explained_variance(value, found[1]))
        self.network.value_reward.absorb(returns[0])
        self.network.value_cost.absorb(returns[1])
        reward, cost = advantages
        combined = constrained_advantages(reward, cost, multipliers, batch.budget_index)
        acting = normalise_by_budget(combined, batch.budget_index, len(multipliers))
        parts = (batch.features, batch.allowed, batch.actions, batch.log_probs, acting, *returns)
        return _Rows(*(part.flatten(0, 1) for part in parts)), explained

    def _minibatches(self, count: int) -> Iterator[Tensor]:
        for _ in range(self.config.epochs):
            order = torch.randperm(count, generator=self._generator)
            yield from order.split(self.config.minibatch_size)

    def _loss(self, rows: _Rows, entropy_coef: float) -> tuple[Tensor, list[float], float]:
        """The loss, its parts for the statistics, and the approximate KL."""
        config, network = self.config, self.network
        log_probs, hidden = network(rows.features, rows.allowed)
        log_ratio = log_prob_of(log_probs, rows.actions) - rows.log_probs
        ratio = log_ratio.exp()
        policy = clipped_loss(ratio, rows.advantages, config.clip)
        value = _value_loss(network.value_reward, hidden, rows.returns_reward)
        cost = _value_loss(network.value_cost, hidden, rows.returns_cost)
        bonus = entropy(log_probs).mean()
        loss = policy + config.value_coef * value + config.cost_value_coef * cost
        loss = loss - entropy_coef * bonus
        with torch.no_grad():
            clipped = ((ratio - 1.0).abs() > config.clip).float().mean()
            kl = float(approximate_kl(log_ratio))
        return loss, [float(part.detach()) for part in (policy, value, cost, bonus, clipped)], kl

    def _descend(self, loss: Tensor) -> float:
        """One optimiser step; the gradient's norm."""
        self._optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.max_grad_norm)
        if not norm.isfinite():
            raise InvalidRequestError(
                "learning_rate", "the gradient is not finite; lower the rate or check the rewards"
            )
        self._optimiser.step()
        return float(norm)

    def state_dict(self) -> State:
        """Everything that the next updates depend on, the network included; copies."""
        moments = self._optimiser.state_dict()["state"]
        return {
            "network": _copies(self.network.state_dict()),
            "optimiser": {str(index): _copies(state) for index, state in moments.items()},
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on where `state_dict` was called."""
        self.network.load_state_dict(state["network"])
        moments = {int(index): value for index, value in state["optimiser"].items()}
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": moments, "param_groups": groups})
        self._generator.set_state(state["generator"])


def _value_loss(head: ValueHead, hidden: Tensor, returns: Tensor) -> Tensor:
    return 0.5 * (head.scaled(hidden) - head.scale(returns)).square().mean()


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
