"""What the learner sees of the world: many environments that step together, under budgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ponderttt.errors import InvalidRequestError

#: Tensors, numbers, strings, booleans and None, in dicts (string keys) and lists of them.
State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Observation:
    """What the policy decides on.

    Args:
        features: [N, F] float32, not normalised.
        allowed: [N, A] bool, at least one per row.
        budget_index: [N] int64, which of the K budgets the running episode is under.
    """

    features: Tensor
    allowed: Tensor
    budget_index: Tensor


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step of every environment gave.

    Args:
        observation: the next one; of a new episode where `done`.
        reward: [N] float32.
        cost: [N] float32, multiples of a forward.
        done: [N] bool, the episode ended with this step.
        truncated: [N] bool, those of `done` that were cut off rather than over: what would have
            come is estimated, not taken as nothing. None: none was.
        final_features: [N, F] float32, the features after the step and before the reset; needed
            where `truncated`.
    """

    observation: Observation
    reward: Tensor
    cost: Tensor
    done: Tensor
    truncated: Tensor | None = None
    final_features: Tensor | None = None


class VectorEnv(Protocol):
    """N environments that step together and reset themselves.

    The constraint of budget k: the mean cost per step, over the steps of episodes under budget k,
    is at most `budgets[k]`. The policy only learns to tell the budgets apart if its features do.
    """

    @property
    def num_envs(self) -> int:
        """N."""
        ...

    @property
    def num_features(self) -> int:
        """F."""
        ...

    @property
    def num_actions(self) -> int:
        """A."""
        ...

    @property
    def num_budgets(self) -> int:
        """K."""
        ...

    @property
    def budgets(self) -> tuple[float, ...]:
        """K mean costs per step, in multiples of a forward."""
        ...

    def reset(self) -> Observation:
        """Start a new episode everywhere."""
        ...

    def step(self, actions: Tensor) -> StepResult:
        """Take one action ([N] int64) in each environment."""
        ...

    def state_dict(self) -> State:
        """Everything that the next steps depend on, the random generator included."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Go on where `state_dict` was called."""
        ...


def check_observation(observation: Observation, env: VectorEnv) -> None:
    """Refuse what would spoil the training quietly.

    Raises:
        InvalidRequestError: a wrong shape or kind, a value that is not finite, a row without an
            allowed action, or a budget that does not exist.
    """
    rows = env.num_envs
    _expect("features", observation.features, (rows, env.num_features), torch.float32)
    _expect("allowed", observation.allowed, (rows, env.num_actions), torch.bool)
    _expect("budget_index", observation.budget_index, (rows,), torch.int64)
    if not observation.allowed.any(-1).all():
        raise InvalidRequestError("env.allowed", "a row allows no action; allow at least one")
    index = observation.budget_index
    if int(index.min()) < 0 or int(index.max()) >= env.num_budgets:
        raise InvalidRequestError(
            "env.budget_index", f"must lie in [0, {env.num_budgets - 1}], the budgets there are"
        )


def check_step(result: StepResult, env: VectorEnv) -> None:
    """As `check_observation`, for all that a step gave."""
    check_observation(result.observation, env)
    rows = (env.num_envs,)
    _expect("reward", result.reward, rows, torch.float32)
    _expect("cost", result.cost, rows, torch.float32)
    _expect("done", result.done, rows, torch.bool)
    if result.truncated is None:
        return
    _expect("truncated", result.truncated, rows, torch.bool)
    if (result.truncated & ~result.done).any():
        raise InvalidRequestError("env.truncated", "is set where `done` is not; set both")
    if result.truncated.any():
        if result.final_features is None:
            raise InvalidRequestError("env.final_features", "are needed where an episode was cut")
        shape = (env.num_envs, env.num_features)
        _expect("final_features", result.final_features, shape, torch.float32)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise InvalidRequestError(
            f"env.{name}", f"{tensor.dtype} {list(tensor.shape)}; must be {dtype} {list(shape)}"
        )
    if dtype.is_floating_point and not tensor.isfinite().all():
        raise InvalidRequestError(f"env.{name}", "has values that are not finite")
