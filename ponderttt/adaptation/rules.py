"""What one gradient step is: the update rule and its limits."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from ponderttt.adaptation.actions import Action
from ponderttt.errors import InvalidRequestError

OptimizerName = Literal["adam", "sgd", "muon"]

#: Steps of the longest write.
MAX_STEPS = max(action.steps for action in Action)

_ABOVE_ZERO = ("learning_rate", "eps", "max_grad_norm", "max_norm")
_BELOW_ONE = ("beta1", "beta2", "decay")


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """One step of test-time training.

    Args:
        learning_rate: of the optimiser.
        beta1, beta2, eps: of Adam; the second moment is kept over a session. beta1 is the momentum
            of SGD and Muon, which have no use for the other two.
        max_grad_norm: L2 norm to which each session's gradient is clipped.
        max_norm: L2 norm that the distance from fresh weights must not exceed; an update that
            goes beyond is rolled back.
        loss_tolerance: nats per token by which an update may make its own chunk's loss worse
            before it is rolled back.
        min_tokens: chunks shorter than this are not learned.
        step_scales: factors on the learning rate of a write's 1st … 4th step.
        optimizer: `adam`, `sgd` (heavy-ball momentum) or `muon` (orthogonalised momentum per
            matrix, with its learning rate scaled so that one for Adam fits).
        decay: share of the distance from fresh weights that is taken back after each step.
        token_share: share of the chunk's tokens that count: those with the highest loss before
            the write.
        trust_region: L2 norm to which the distance from fresh weights is cut back after each
            step; None: only max_norm bounds it.
        freeze_a: whether only the B matrices move.
        judge_share: share of the chunk's tokens, in evenly spaced runs, on which the loss after
            the update is measured; the others cost nothing.
    Raises:
        InvalidRequestError: a value is out of range.
    """

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    max_norm: float = 100.0
    loss_tolerance: float = 0.01
    min_tokens: int = 32
    step_scales: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    optimizer: OptimizerName = "adam"
    decay: float = 0.0
    token_share: float = 1.0
    trust_region: float | None = None
    freeze_a: bool = False
    judge_share: float = 1.0

    def __post_init__(self) -> None:
        # JSON has lists only.
        if isinstance(self.step_scales, list):
            object.__setattr__(self, "step_scales", tuple(self.step_scales))
        self._check_kinds()
        for name in _ABOVE_ZERO:
            _check_above_zero(name, getattr(self, name))
        for name in _BELOW_ONE:
            if not 0 <= getattr(self, name) < 1:
                raise InvalidRequestError(name, f"{getattr(self, name)} lies outside [0, 1)")
        if not (_finite(self.loss_tolerance) and self.loss_tolerance >= 0):
            raise InvalidRequestError("loss_tolerance", f"{self.loss_tolerance} must be 0 or more")
        if self.min_tokens < 2:
            raise InvalidRequestError("min_tokens", f"{self.min_tokens} is below 2")
        for scale in self.step_scales:
            _check_above_zero("step_scales", scale)
        if not 0 < self.token_share <= 1:
            raise InvalidRequestError("token_share", f"{self.token_share} lies outside (0, 1]")
        if not 0 < self.judge_share <= 1:
            raise InvalidRequestError("judge_share", f"{self.judge_share} lies outside (0, 1]")
        if self.trust_region is not None:
            _check_above_zero("trust_region", self.trust_region)

    def _check_kinds(self) -> None:
        for name in (*_ABOVE_ZERO, *_BELOW_ONE, "loss_tolerance", "token_share", "judge_share"):
            _check_number(name, getattr(self, name))
        _check_number("min_tokens", self.min_tokens, whole=True)
        if self.trust_region is not None:
            _check_number("trust_region", self.trust_region)
        if self.optimizer not in get_args(OptimizerName):
            known = ", ".join(get_args(OptimizerName))
            raise InvalidRequestError("optimizer", f"{self.optimizer!r} is not one of {known}")
        if not isinstance(self.freeze_a, bool):
            raise InvalidRequestError("freeze_a", f"{self.freeze_a!r} is not true or false")
        scales = self.step_scales
        if not isinstance(scales, tuple) or len(scales) != MAX_STEPS:
            raise InvalidRequestError(
                "step_scales", f"{scales!r} is not a list of {MAX_STEPS} numbers, one per step"
            )
        for scale in scales:
            _check_number("step_scales", scale)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UpdateRule:
        """Build from a mapping; unknown keys raise InvalidRequestError."""
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise InvalidRequestError(key, f"unknown; an update rule has {sorted(known)}")
        return cls(**values)


def _finite(value: float) -> bool:
    # Not math.isfinite, which cannot take a whole number too large for a float; JSON may have one.
    return abs(value) <= sys.float_info.max


def _check_number(name: str, value: object, *, whole: bool = False) -> None:
    kinds = int if whole else int | float
    if not isinstance(value, kinds) or isinstance(value, bool):
        kind = "whole number" if whole else "number"
        raise InvalidRequestError(name, f"{value!r} is not a {kind}")


def _check_above_zero(name: str, value: float) -> None:
    if not (_finite(value) and value > 0):
        raise InvalidRequestError(name, f"{value} must be finite and above 0")
