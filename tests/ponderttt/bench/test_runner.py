"""Rounds, their order, and what a row says."""

from __future__ import annotations

import pytest

from ponderttt.bench.lab import Lab
from ponderttt.bench.runner import measure
from ponderttt.bench.workload import Target
from tests.ponderttt.bench.fakes import Scripted


def nobody(line: str) -> None:
    """Hears nothing."""


def test_sides_alternate_and_a_side_that_is_missing_is_asked_once(lab: Lab) -> None:
    workload = Scripted()
    measure(workload, lab, 2, nobody)
    assert workload.calls == [
        ("absent", 0), ("theirs", 0), ("ours", 0), ("ours", 1), ("theirs", 1), ("theirs", 2),
        ("ours", 2),
    ]  # fmt: skip
    assert workload.closed


def test_row_leaves_out_the_round_that_warms_up(lab: Lab) -> None:
    row = measure(Scripted(), lab, 2, nobody)
    assert row["sides"]["ours"]["values"] == [4.0, 6.0]
    assert row["sides"]["ours"]["median"] == 5.0
    assert row["sides"]["ours"]["extra"]["loss"]["values"] == [0.5, 0.5]
    assert row["sides"]["theirs"]["extra"] == {}


def test_row_compares_and_says_why_it_could_not(lab: Lab) -> None:
    row = measure(Scripted(), lab, 3, nobody)
    first, second = row["comparisons"]
    assert first["ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert (first["met"], first["goal_met"]) == (True, False)
    assert "ratio" not in second
    assert second["skipped"].startswith("not here")
    assert list(row["skipped"]) == ["absent"]


@pytest.mark.parametrize(
    ("target", "ratio", "met", "goal_met"),
    [
        (Target(1.4, 2.0), 1.4, True, False),
        (Target(1.4, 2.0), 1.39, False, False),
        (Target(1.4, 2.0), 2.0, True, True),
        (Target(1.25, 1.1, "lower"), 1.25, True, False),
        (Target(1.25, 1.1, "lower"), 1.26, False, False),
        (Target(1.25, 1.1, "lower"), 1.0, True, True),
        (Target(), 1.0, None, None),
    ],
)
def test_target_is_met_at_its_limit(
    target: Target, ratio: float, met: bool | None, goal_met: bool | None
) -> None:
    assert (target.met(ratio), target.goal_met(ratio)) == (met, goal_met)
