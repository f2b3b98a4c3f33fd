"""Gathering rollouts: the part that may run somewhere else than the learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ponderttt.errors import InvalidRequestError
from training.ppo.categorical import log_prob_of, sample
from training.ppo.config import whole
from training.ppo.environment import (
    Observation,
    State,
    VectorEnv,
    check_observation,
    check_step,
)
from training.ppo.network import NUM_ACTIONS, NUM_FEATURES, ActorCritic

#: `ActorCritic.state_dict()`.
PolicyState = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """T steps of N environments under one policy.

    Args:
        features: [T, N, F] float32, raw.
        allowed: [T, N, A] bool.
        budget_index: [T, N] int64.
        actions: [T, N] int64.
        log_probs: [T, N] float32, of the actions, under the policy that took them.
        rewards, costs: [T, N] float32.
        done: [T, N] bool, the episode ended with this step, over or cut off.
        terminated: [T, N] bool, those of `done` that were over: nothing would have come after.
        next_features: [T, N, F] float32, after the step and before any reset.
    """

    features: Tensor
    allowed: Tensor
    budget_index: Tensor
    actions: Tensor
    log_probs: Tensor
    rewards: Tensor
    costs: Tensor
    done: Tensor
    terminated: Tensor
    next_features: Tensor


def concatenate(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """One batch of the environments of several, in their order.

    Raises:
        InvalidRequestError: no batch, or of different numbers of steps.
    """
    steps = {len(batch.rewards) for batch in batches}
    if len(steps) != 1:
        raise InvalidRequestError(
            "batches", f"have {sorted(steps)} steps; give at least one, all of the same length"
        )
    return RolloutBatch(
        *(torch.cat([getattr(b, field.name) for b in batches], 1) for field in fields(RolloutBatch))
    )


@runtime_checkable
class RolloutSource(Protocol):
    """Gathers rollouts with the policy it is given; in this process or in others."""

    @property
    def num_envs(self) -> int:
        """Environments in all."""
        ...

    @property
    def budgets(self) -> tuple[float, ...]:
        """K mean costs per step."""
        ...

    def collect(self, policy_state: PolicyState) -> RolloutBatch:
        """The next rollout, under this policy."""
        ...

    def state_dict(self) -> State:
        """Everything that the next rollouts depend on, apart from the policy."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Go on where `state_dict` was called."""
        ...


class InProcessSource:
    """Steps one vectorised environment, here.

    Args:
        env: must have the policy's 32 features and 4 actions; pad and disallow what is too much.
        num_steps: T.
        hidden_sizes: of the policy's trunk.
        seed: of the sampled actions; give each source one of its own.
    Raises:
        InvalidRequestError: the environment does not fit the policy.
    """

    def __init__(
        self, env: VectorEnv, num_steps: int, hidden_sizes: tuple[int, ...], seed: int
    ) -> None:
        whole("num_steps", num_steps, 1)
        for name, needed in (("num_features", NUM_FEATURES), ("num_actions", NUM_ACTIONS)):
            found = getattr(env, name)
            if found != needed:
                raise InvalidRequestError(f"env.{name}", f"{found}; the policy has {needed}")
        if env.num_budgets != len(env.budgets):
            raise InvalidRequestError("env.num_budgets", f"must be {len(env.budgets)}, as budgets")
        self.env = env
        self._num_steps = num_steps
        self._network = ActorCritic(hidden_sizes)
        self._generator = torch.Generator().manual_seed(seed)
        self._observation: Observation | None = None

    @property
    def num_envs(self) -> int:
        return self.env.num_envs

    @property
    def budgets(self) -> tuple[float, ...]:
        return tuple(self.env.budgets)

    @torch.no_grad()
    def collect(self, policy_state: PolicyState) -> RolloutBatch:
        """T steps on from where the last rollout stopped; episodes run on across rollouts.

        Raises:
            InvalidRequestError: the environment gave something unusable; names it.
        """
        self._network.load_state_dict(policy_state)
        if self._observation is None:
            self._observation = self.env.reset()
            check_observation(self._observation, self.env)
        rows: list[tuple[Tensor, ...]] = []
        for _ in range(self._num_steps):
            row, self._observation = self._step(self._observation)
            rows.append(row)
        return RolloutBatch(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def _step(self, before: Observation) -> tuple[tuple[Tensor, ...], Observation]:
        """One step of all environments: a row of the batch, and what to decide on next."""
        log_probs = self._network(before.features, before.allowed).log_probs
        actions = sample(log_probs, self._generator)
        result = self.env.step(actions)
        check_step(result, self.env)
        terminated, after = result.done, result.observation.features
        if result.truncated is not None and result.final_features is not None:
            terminated = result.done & ~result.truncated
            after = torch.where(result.truncated[:, None], result.final_features, after)
        # Copies: an environment may reuse its buffers.
        row = (
            before.features.clone(),
            before.allowed.clone(),
            before.budget_index.clone(),
            actions,
            log_prob_of(log_probs, actions),
            result.reward.clone(),
            result.cost.clone(),
            result.done.clone(),
            terminated.clone(),
            after.clone(),
        )
        return row, _copy(result.observation)

    def state_dict(self) -> State:
        seen = self._observation
        return {
            "env": self.env.state_dict(),
            "generator": self._generator.get_state(),
            "observation": None
            if seen is None
            else {f.name: getattr(seen, f.name) for f in fields(Observation)},
        }

    def load_state_dict(self, state: State) -> None:
        self.env.load_state_dict(state["env"])
        self._generator.set_state(state["generator"])
        seen = state["observation"]
        self._observation = None if seen is None else Observation(**seen)
        if self._observation is not None:
            check_observation(self._observation, self.env)


class CombinedSource:
    """Several sources as one, asked one after the other.

    Args:
        sources: must have the same budgets.
    Raises:
        InvalidRequestError: no source, or different budgets.
    """

    def __init__(self, sources: Sequence[RolloutSource]) -> None:
        if len({source.budgets for source in sources}) != 1:
            raise InvalidRequestError(
                "sources", "must be at least one, and all of the same budgets in the same order"
            )
        self._sources = tuple(sources)

    @property
    def num_envs(self) -> int:
        return sum(source.num_envs for source in self._sources)

    @property
    def budgets(self) -> tuple[float, ...]:
        return self._sources[0].budgets

    def collect(self, policy_state: PolicyState) -> RolloutBatch:
        """The sources' rollouts side by side."""
        return concatenate([source.collect(policy_state) for source in self._sources])

    def state_dict(self) -> State:
        return {"sources": [source.state_dict() for source in self._sources]}

    def load_state_dict(self, state: State) -> None:
        for source, theirs in zip(self._sources, state["sources"], strict=True):
            source.load_state_dict(theirs)


def _copy(observation: Observation) -> Observation:
    return Observation(*(getattr(observation, f.name).clone() for f in fields(Observation)))
