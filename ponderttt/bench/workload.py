"""What a row of the benchmark is made of: sides that do the same work, and who is compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ponderttt.bench.lab import Lab

Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one side.

    Args:
        value: in the workload's unit.
        extra: further figures by name (a loss that was reached, the longest gap).
    """

    value: float
    extra: Mapping[str, float] = field(default_factory=dict)


#: Measures round r (0 warms up); raises UnavailableError where its peer is not installed.
Side = Callable[[int], Sample]


@dataclass(frozen=True, slots=True)
class Target:
    """What a ratio is to reach; None: nothing was promised.

    Args:
        at_least: the limit (at most it, where less is better).
        goal: what would be better still.
        better: which way.
    """

    at_least: float | None = None
    goal: float | None = None
    better: Better = "higher"

    def met(self, ratio: float) -> bool | None:
        """Whether the limit is kept."""
        return self._reached(ratio, self.at_least)

    def goal_met(self, ratio: float) -> bool | None:
        """Whether the goal is reached."""
        return self._reached(ratio, self.goal)

    def _reached(self, ratio: float, limit: float | None) -> bool | None:
        if limit is None:
            return None
        return ratio >= limit if self.better == "higher" else ratio <= limit


@dataclass(frozen=True, slots=True)
class Comparison:
    """The ratio ours / theirs of two sides' values.

    Args:
        what: the row of the table.
        against: the peer, as the table names it.
        ours, theirs: names of sides.
        target: for the ratio.
    """

    what: str
    against: str
    ours: str
    theirs: str
    target: Target = Target()


class Workload(Protocol):
    """A few sides on the same seeded work."""

    @property
    def name(self) -> str:
        """As `--only` takes it."""

    @property
    def unit(self) -> str:
        """Of the samples' values."""

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Which sides are compared, with targets."""

    def open(self, lab: Lab, stack: ExitStack) -> Mapping[str, Side]:
        """Prepare the sides; what must be closed afterwards is left on the stack."""
