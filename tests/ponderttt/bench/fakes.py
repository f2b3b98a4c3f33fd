"""A workload with scripted figures."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from ponderttt.bench.lab import Lab
from ponderttt.bench.workload import Comparison, Sample, Side, Target
from ponderttt.errors import UnavailableError


@dataclass
class Scripted:
    """`ours` gives 2, 4, 6 …, `theirs` half of it; `absent` is not installed."""

    name: str = "scripted"
    unit: str = "things/s"
    comparisons: tuple[Comparison, ...] = (
        Comparison("things", "the others", "ours", "theirs", Target(1.5, 2.5)),
        Comparison("things", "somebody absent", "ours", "absent", Target(1.5)),
    )
    calls: list[tuple[str, int]] = field(default_factory=list)
    closed: bool = False

    def open(self, lab: Lab, stack: ExitStack) -> Mapping[str, Side]:
        """Three sides."""
        stack.callback(self._close)
        return {"ours": self._ours, "theirs": self._theirs, "absent": self._absent}

    def _close(self) -> None:
        self.closed = True

    def _ours(self, number: int) -> Sample:
        self.calls.append(("ours", number))
        return Sample(2.0 * (number + 1), {"loss": 0.5})

    def _theirs(self, number: int) -> Sample:
        self.calls.append(("theirs", number))
        return Sample(1.0 * (number + 1))

    def _absent(self, number: int) -> Sample:
        self.calls.append(("absent", number))
        raise UnavailableError("not here; run `this`\nand more")
