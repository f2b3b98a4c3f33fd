"""Every row runs on small sizes; what a row promises is what was asked for."""

from __future__ import annotations

import math

import pytest

from ponderttt.bench.lab import Lab
from ponderttt.bench.runner import measure
from ponderttt.bench.scaling import curves, measure_curve
from ponderttt.bench.workload import Workload
from ponderttt.bench.workloads import ALL

VLLM = {"decode-1", "decode-16"}


def nobody(line: str) -> None:
    """Hears nothing."""


@pytest.mark.parametrize("workload", ALL, ids=lambda w: w.name)
def test_row_has_a_ratio_for_every_peer_that_is_here(workload: Workload, lab: Lab) -> None:
    row = measure(workload, lab, 1, nobody)
    assert set(row["skipped"]) == ({"vllm"} if workload.name in VLLM else set())
    for comparison in row["comparisons"]:
        if comparison["theirs"] == "vllm":
            assert "vllm_env" in comparison["skipped"]
        else:
            assert math.isfinite(comparison["ratio"]["median"])
    values = [v for name, s in row["sides"].items() if name != "resident" for v in s["values"]]
    assert all(value > 0 for value in values)


def test_rows_have_names_of_their_own() -> None:
    assert len({workload.name for workload in ALL}) == len(ALL)


def test_sides_that_learn_report_the_loss_they_reached(lab: Lab) -> None:
    (workload,) = [workload for workload in ALL if workload.name == "prompt-heavy-8"]
    sides = measure(workload, lab, 1, nobody)["sides"]
    losses = {name: side["extra"]["loss"]["median"] for name, side in sides.items()}
    assert losses["ours"] == pytest.approx(losses["same place"], rel=0.01)


@pytest.mark.parametrize("name", ["sessions", "context", "rank", "adaptive blocks"])
def test_curve_has_every_point(lab: Lab, name: str) -> None:
    curve = measure_curve(lab, name, 1, nobody)
    assert [point[name] for point in curve["points"]] == list(curves(lab, 1)[name])
    for point in curve["points"]:
        assert point["decode"]["median"] > 0
        assert point["write"]["median"] > 0


def test_contexts_end_where_the_model_does(lab: Lab) -> None:
    # 512 positions; 13 chunks of 32 and one token leave 95.
    assert list(curves(lab, 12)["context"]) == [64]
