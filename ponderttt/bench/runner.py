"""Measures a workload: sides in alternating order, one round to warm up, then the repeats."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from ponderttt.bench.lab import Lab
from ponderttt.bench.spread import ratio_spread, spread
from ponderttt.bench.workload import Comparison, Sample, Workload
from ponderttt.errors import UnavailableError

# Idle threads of the side before spin for a while.
_SETTLE_SECONDS = 0.25


def measure(
    workload: Workload, lab: Lab, repeats: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """One row of the results, as JSON has it.

    Args:
        workload: what is measured.
        lab: with which model.
        repeats: rounds that count.
        tell: hears what is being done.
    Returns:
        `name`, `unit`, `sides` (values and extra figures, one per round), `skipped` (reason by
        side) and `comparisons`.
    """
    samples: dict[str, list[Sample]] = {}
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        sides = workload.open(lab, stack)
        for number in range(repeats + 1):
            names = list(sides) if number % 2 else list(sides)[::-1]
            for name in names:
                if name in skipped:
                    continue
                if not lab.quick:
                    time.sleep(_SETTLE_SECONDS)
                tell(f"{workload.name}: {name}, round {number} of {repeats}")
                try:
                    sample = sides[name](number)
                except UnavailableError as error:
                    skipped[name] = str(error)
                    continue
                if number:
                    samples.setdefault(name, []).append(sample)
    measured = {name: _side(samples[name]) for name in sides if name not in skipped}
    return {
        "name": workload.name,
        "unit": workload.unit,
        "sides": measured,
        "skipped": skipped,
        "comparisons": [_compare(c, measured, skipped) for c in workload.comparisons],
    }


def _side(samples: Sequence[Sample]) -> dict[str, Any]:
    values = [sample.value for sample in samples]
    extra = {name: [s.extra[name] for s in samples if name in s.extra] for name in samples[0].extra}
    return {
        "values": values,
        **asdict(spread(values)),
        "extra": {name: {"values": each, **asdict(spread(each))} for name, each in extra.items()},
    }


def _compare(
    comparison: Comparison, sides: Mapping[str, Any], skipped: Mapping[str, str]
) -> dict[str, Any]:
    target = comparison.target
    row: dict[str, Any] = {
        "what": comparison.what,
        "against": comparison.against,
        "ours": comparison.ours,
        "theirs": comparison.theirs,
        "at_least": target.at_least,
        "goal": target.goal,
        "better": target.better,
    }
    for name in (comparison.ours, comparison.theirs):
        if name in skipped:
            return {**row, "skipped": skipped[name]}
    ratio = ratio_spread(sides[comparison.ours]["values"], sides[comparison.theirs]["values"])
    return {
        **row,
        "ratio": asdict(ratio),
        "met": target.met(ratio.median),
        "goal_met": target.goal_met(ratio.median),
    }
