"""The Lagrange multipliers, steered by a PID controller on each budget's violation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ponderttt.errors import InvalidRequestError
from training.ppo.config import whole, within
from training.ppo.environment import State


@dataclass(frozen=True, slots=True)
class PIDConfig:
    """Gains and smoothing; the gains turn multiples of a forward into reward per forward.

    The defaults suit rewards of about 1 per step; scale the three gains with the reward. A `kp`
    well above `ki` matters: it moves the multiplier before the policy has settled on actions, after
    which it no longer tries the others.

    Args:
        kp, ki, kd: gains of the violation, of its sum and of the cost's rise. All 0: the multiplier
            stays 0 and the constraint is ignored.
        integral_max: bound of the violations' sum, so that a long violation that nothing could
            prevent is not paid for just as long (anti-windup).
        delta_decay: share of the old average that stays in the smoothed violation; 0: no smoothing.
        cost_decay: the same for the smoothed cost of the derivative.
        delay: iterations over which the cost's rise is taken.
        initial: the multiplier that the integral starts with.
        equality: let sum and multiplier fall below zero, to -`integral_max` and to ki times that: a
            budget is then also used up, not only respected.
    Raises:
        InvalidRequestError: a value is out of range.
    """

    kp: float = 0.3
    ki: float = 0.02
    kd: float = 0.1
    integral_max: float = 1000.0
    delta_decay: float = 0.5
    cost_decay: float = 0.9
    delay: int = 10
    initial: float = 0.0
    equality: bool = False

    def __post_init__(self) -> None:
        for name in ("kp", "ki", "kd", "integral_max"):
            within(name, getattr(self, name), 0.0)
        for name in ("delta_decay", "cost_decay"):
            within(name, getattr(self, name), 0.0, 1.0)
            if getattr(self, name) == 1.0:
                raise InvalidRequestError(name, "1 would never take in a new value; choose less")
        whole("delay", self.delay, 1)
        most = self.ki * self.integral_max
        within("initial", self.initial, -most if self.equality else 0.0, most)


class PIDController:
    """One multiplier per budget (Stooke, Achiam, Abbeel, ICML 2020, arXiv:2007.03964, algorithm 2).

    Per update with violation Δ = cost - budget:

        I ← clamp(I + Δ, 0, integral_max)
        D ← max(0, smoothed cost - smoothed cost `delay` updates ago)
        λ ← max(0, kp · smoothed Δ + ki · I + kd · D)

    The derivative only brakes a rise: a cost that falls towards its budget is not held back. Unlike
    in the authors' code, both averages start at the first value instead of 0, which would be taken
    for a steep rise at first.

    Args:
        budgets: K mean costs per step.
        config: gains and smoothing.
    Raises:
        InvalidRequestError: no budget, or one that is not finite.
    """

    def __init__(self, budgets: Sequence[float], config: PIDConfig) -> None:
        if not budgets or not all(math.isfinite(budget) for budget in budgets):
            raise InvalidRequestError("budgets", f"{tuple(budgets)} must be finite, at least one")
        self.budgets = tuple(float(budget) for budget in budgets)
        self.config = config
        count = len(self.budgets)
        self._limits = torch.tensor(self.budgets, dtype=torch.float64)
        self._integral = torch.zeros(count, dtype=torch.float64)
        if config.ki > 0.0:
            self._integral += config.initial / config.ki
        self._multipliers = torch.full((count,), config.initial, dtype=torch.float64)
        self._delta = torch.zeros(count, dtype=torch.float64)
        self._cost = torch.zeros(count, dtype=torch.float64)
        # Row 0 is the oldest of the last `delay` smoothed costs.
        self._past = torch.zeros(config.delay, count, dtype=torch.float64)
        self._started = torch.zeros(count, dtype=torch.bool)

    @property
    def multipliers(self) -> Tensor:
        """[K] float32: λ as of the last update."""
        return self._multipliers.float()

    def update(self, costs: Tensor) -> Tensor:
        """Take in one rollout's mean costs.

        Args:
            costs: [K] mean cost per step under each budget; NaN for a budget that no episode was
                under: its multiplier stays as it is.
        Returns:
            The new multipliers, [K] float32.
        Raises:
            InvalidRequestError: not [K], or infinite.
        """
        if costs.shape != self._limits.shape or costs.isinf().any():
            raise InvalidRequestError("costs", f"{costs} must be {len(self.budgets)} finite values")
        costs, config = costs.double(), self.config
        seen = ~costs.isnan()
        first = seen & ~self._started
        delta = costs - self._limits
        lowest = -config.integral_max if config.equality else 0.0

        integral = (self._integral + delta).clamp(lowest, config.integral_max)
        smooth_delta = torch.where(first, delta, _blend(self._delta, delta, config.delta_decay))
        smooth_cost = torch.where(first, costs, _blend(self._cost, costs, config.cost_decay))
        past = torch.where(first, costs, self._past)
        rise = (smooth_cost - past[0]).clamp_min(0.0)
        multipliers = config.kp * smooth_delta + config.ki * integral + config.kd * rise

        self._integral = torch.where(seen, integral, self._integral)
        self._delta = torch.where(seen, smooth_delta, self._delta)
        self._cost = torch.where(seen, smooth_cost, self._cost)
        self._past = torch.where(seen, torch.cat((past[1:], smooth_cost[None])), self._past)
        bounded = multipliers.clamp_min(config.ki * lowest)
        self._multipliers = torch.where(seen, bounded, self._multipliers)
        self._started |= seen
        return self.multipliers

    def state_dict(self) -> State:
        """Everything that the next updates depend on."""
        return {name: getattr(self, f"_{name}").clone() for name in self._STATE}

    def load_state_dict(self, state: State) -> None:
        """Go on where `state_dict` was called.

        Raises:
            InvalidRequestError: the state is of other budgets or another delay.
        """
        for name in self._STATE:
            mine, theirs = getattr(self, f"_{name}"), state.get(name)
            if not isinstance(theirs, Tensor) or theirs.shape != mine.shape:
                raise InvalidRequestError(f"controller.{name}", "does not fit this controller")
        for name in self._STATE:
            setattr(self, f"_{name}", state[name].clone())

    _STATE = ("integral", "multipliers", "delta", "cost", "past", "started")


def _blend(old: Tensor, new: Tensor, decay: float) -> Tensor:
    return decay * old + (1.0 - decay) * new
