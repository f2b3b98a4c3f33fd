"""What one gradient step is, per model: the update rule and its figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any

from ponderttt.errors import InvalidRequestError

_RULES = "update_rules.json"


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """One step of test-time training.

    Args:
        learning_rate: of Adam.
        beta1, beta2, eps: of Adam; the second moment is kept over a session.
        max_grad_norm: L2 norm to which each session's gradient is clipped.
        max_norm: L2 norm that the distance from fresh weights must not exceed.
        loss_tolerance: nats per token by which an update may make its own chunk's loss worse
            before it is rolled back.
        min_tokens: chunks shorter than this are not learned.
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

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_number(field.name, getattr(self, field.name), whole=field.name == "min_tokens")
        for name in ("learning_rate", "eps", "max_grad_norm", "max_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InvalidRequestError(name, f"{value} must be finite and above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidRequestError(name, f"{getattr(self, name)} lies outside [0, 1)")
        if not (math.isfinite(self.loss_tolerance) and self.loss_tolerance >= 0):
            raise InvalidRequestError("loss_tolerance", f"{self.loss_tolerance} must be 0 or more")
        if self.min_tokens < 2:
            raise InvalidRequestError("min_tokens", f"{self.min_tokens} is below 2")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UpdateRule:
        """Build from a mapping; unknown keys raise InvalidRequestError."""
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise InvalidRequestError(key, f"unknown; an update rule has {sorted(known)}")
        return cls(**values)


def _check_number(name: str, value: object, *, whole: bool) -> None:
    kinds = int if whole else int | float
    if not isinstance(value, kinds) or isinstance(value, bool):
        kind = "whole number" if whole else "number"
        raise InvalidRequestError(name, f"{value!r} is not a {kind}")


def rule_for(model_name: str) -> UpdateRule:
    """The calibrated rule of an embedded model, or a careful default for any other."""
    shipped = json.loads(files("ponderttt.adaptation").joinpath(_RULES).read_text())
    return UpdateRule.from_dict(shipped.get(model_name, {"rule": {}})["rule"])
