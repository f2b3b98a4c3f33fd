"""The four actions and what they cost, nominally and as measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

CostModelName = Literal["nominal", "measured"]


class Action(IntEnum):
    """How hard to ponder one chunk; the value is the index in a policy's output."""

    SKIP = 0
    UPDATE_1 = 1
    UPDATE_2 = 2
    UPDATE_4 = 3

    @property
    def steps(self) -> int:
        """Gradient steps: 0, 1, 2 or 4."""
        return (0, 1, 2, 4)[self.value]


#: Multiples of one chunk's forward, as published with the method.
NOMINAL_COSTS: Mapping[Action, float] = {
    Action.SKIP: 1.0,
    Action.UPDATE_1: 3.0,
    Action.UPDATE_2: 5.0,
    Action.UPDATE_4: 12.0,
}


@dataclass(frozen=True, slots=True)
class CostModel:
    """What each action costs, in multiples of the forward of one SKIP chunk.

    Args:
        name: `nominal` or `measured`.
        costs: one number per action; SKIP is 1.
        chunk_seconds: seconds of one SKIP chunk where it was measured, else 0.
    """

    name: CostModelName
    costs: Mapping[Action, float]
    chunk_seconds: float = 0.0

    def __getitem__(self, action: Action) -> float:
        return self.costs[action]


NOMINAL = CostModel("nominal", NOMINAL_COSTS)
