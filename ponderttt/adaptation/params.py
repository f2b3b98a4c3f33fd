"""What a caller may ask of test-time training (the `ttt` object of a request)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ponderttt.adaptation.actions import NOMINAL_COSTS, Action, CostModelName
from ponderttt.errors import InvalidRequestError

GateName = Literal["policy", "threshold", "random", "fixed", "off"]
AdaptOn = Literal["prompt", "generated", "both"]
When = Literal["inline", "background"]
Read = Literal["auto", "session"]

MIN_CHUNK, MAX_CHUNK = 16, 2048
MIN_BUDGET, MAX_BUDGET = NOMINAL_COSTS[Action.SKIP], NOMINAL_COSTS[Action.UPDATE_4]


def _one_of(param: str, value: object, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise InvalidRequestError(param, f"{value!r} is not one of {', '.join(allowed)}")


def _whole(param: str, value: object) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise InvalidRequestError(param, f"{value!r} is not a whole number")


def check_budget(param: str, budget: float | None) -> None:
    """Raise InvalidRequestError unless `budget` is None or lies in [1, 12] × forward."""
    if budget is None:
        return
    if not isinstance(budget, int | float) or isinstance(budget, bool) or not math.isfinite(budget):
        raise InvalidRequestError(param, f"{budget!r} is not a finite number")
    if not MIN_BUDGET <= budget <= MAX_BUDGET:
        raise InvalidRequestError(
            param,
            f"{budget:g} lies outside [{MIN_BUDGET:g}, {MAX_BUDGET:g}]; it is the highest "
            "mean cost per chunk in multiples of a forward (1 = never learn)",
        )


@dataclass(frozen=True, slots=True)
class TTTParams:
    """Test-time-training parameters of one request; None means the session's or server's default.

    Args:
        session: whose fast weights to use; None: weights that live for this request only.
        gate: who decides per chunk.
        action: the action of gate `fixed`.
        budget: highest mean cost per chunk, × forward, in [1, 12].
        cost_model: in which costs the budget is counted.
        chunk_size: tokens per chunk, in [16, 2048].
        adapt_on: learn the prompt, the generated text, or both.
        when: `inline` learns each chunk before reading on; `background` answers first and learns
            in idle time (sessions only).
        read: whose weights answer a prompt: `auto` the session's where they predict the prompt
            clearly better than the base model's, else those; `session` always the session's.
        seed: of the gate `random`.
    Raises:
        InvalidRequestError: a value is out of range; `param` is `ttt.<field>`.
    """

    session: str | None = None
    gate: GateName | None = None
    action: Action | None = None
    budget: float | None = None
    cost_model: CostModelName | None = None
    chunk_size: int | None = None
    adapt_on: AdaptOn | None = None
    when: When | None = None
    read: Read | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _one_of("ttt.gate", self.gate, get_args(GateName))
        _one_of("ttt.cost_model", self.cost_model, get_args(CostModelName))
        _one_of("ttt.adapt_on", self.adapt_on, get_args(AdaptOn))
        _one_of("ttt.when", self.when, get_args(When))
        _one_of("ttt.read", self.read, get_args(Read))
        check_budget("ttt.budget", self.budget)
        _whole("ttt.chunk_size", self.chunk_size)
        _whole("ttt.seed", self.seed)
        if self.chunk_size is not None and not MIN_CHUNK <= self.chunk_size <= MAX_CHUNK:
            raise InvalidRequestError(
                "ttt.chunk_size",
                f"{self.chunk_size} lies outside [{MIN_CHUNK}, {MAX_CHUNK}] tokens",
            )
        if self.action is not None and not isinstance(self.action, Action):
            raise InvalidRequestError(
                "ttt.action", f"{self.action!r} is not one of {', '.join(a.name for a in Action)}"
            )
        if self.action is not None and self.gate not in (None, "fixed"):
            raise InvalidRequestError(
                "ttt.action", f"only gate 'fixed' takes an action, not {self.gate!r}; leave it out"
            )
        if self.when == "background" and self.session is None:
            raise InvalidRequestError(
                "ttt.when", "'background' needs a session to learn for; name one in ttt.session"
            )
