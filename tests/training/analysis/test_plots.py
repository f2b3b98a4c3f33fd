"""Plots: what is drawn is what was measured, and files that can't be read or written are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import imread

from ponderttt.errors import InvalidRequestError
from training.analysis import plots
from training.analysis.outcomes import MethodResult
from training.analysis.plots import (
    plot_against_cost,
    plot_training,
    read_statistics,
    running_mean,
)
from training.analysis.statistics import Interval


def result(method: str, budget: float, gain: float, bars: bool = True) -> MethodResult:
    interval = Interval(gain, gain - 0.01 if bars else None, gain + 0.02 if bars else None, 5)
    costs = {"nominal": budget - 0.1, "measured": budget - 0.2}
    return MethodResult(method, budget, interval, None, costs, budget, {}, {})


RESULTS = [
    result("policy", 2.0, 0.05),
    result("policy", 1.5, 0.03),
    result("random", 1.5, 0.02, bars=False),
]


def line(budget_cost: float, index: int) -> dict[str, Any]:
    row = {"budget": 2.0, "steps": 8, "reward": None, "cost": budget_cost, "multiplier": 0.1}
    return {"iteration": index, "steps": 8 * (index + 1), "budgets": [row, {**row, "budget": 3.0}]}


def bars(axes: Axes) -> list[ErrorbarContainer]:
    return [found for found in axes.containers if isinstance(found, ErrorbarContainer)]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that were saved, besides being saved."""
    kept: list[Figure] = []
    save = plots._save

    def keep(figure: Figure, path: Path) -> None:
        kept.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return kept


def test_every_method_has_a_line_through_its_budgets(tmp_path: Path, figures: list[Figure]) -> None:
    path = tmp_path / "new" / "gain.png"
    plot_against_cost(RESULTS, path, budgets=(1.5, 2.0))
    (axes,) = figures[0].axes
    policy, random = bars(axes)
    assert [policy.get_label(), random.get_label()] == ["policy", "random"]
    drawn = policy.lines[0].get_xydata()
    assert drawn == pytest.approx(np.array([[1.4, 30.0], [1.9, 50.0]]))
    bar = policy.lines[2][0].get_segments()[0]
    assert bar[:, 1] == pytest.approx([20.0, 50.0])
    assert random.lines[2][0].get_segments()[0][:, 1] == pytest.approx([20.0, 20.0])
    pixels = imread(path)
    assert pixels.shape[1] > 1000
    assert pixels.std() > 0.01


def test_a_loss_is_that_of_skip_less_the_gain(tmp_path: Path, figures: list[Figure]) -> None:
    plot_against_cost(RESULTS, tmp_path / "loss.svg", "measured", skip_loss=2.0)
    (axes,) = figures[0].axes
    policy = bars(axes)[0]
    assert policy.lines[0].get_xydata() == pytest.approx(np.array([[1.3, 1.97], [1.8, 1.95]]))
    # Ends change places: the most that may have been saved is the lowest loss.
    assert policy.lines[2][0].get_segments()[0][:, 1] == pytest.approx([1.95, 1.98])
    assert "loss" in axes.get_ylabel()


def test_a_training_run_is_drawn_by_budget(tmp_path: Path, figures: list[Figure]) -> None:
    statistics = tmp_path / "statistics.jsonl"
    rows = [line(4.0 - 0.1 * i, i) for i in range(10)]
    # The machine stopped while it wrote the last line.
    statistics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 1')
    plot_training(statistics, tmp_path / "train.png")
    reward, cost, multiplier = figures[0].axes
    labelled = [drawn for drawn in cost.lines if str(drawn.get_label()).startswith("budget")]
    assert [drawn.get_label() for drawn in labelled] == ["budget 2", "budget 3"]
    assert labelled[0].get_xydata() == pytest.approx(
        np.array([[8 * (i + 1), 4.0 - 0.1 * i] for i in range(10)])
    )
    assert [
        np.asarray(drawn.get_ydata())[0] for drawn in cost.lines if drawn.get_linestyle() == "--"
    ] == [
        2,
        3,
    ]
    assert np.isnan(np.asarray(reward.lines[0].get_ydata(), dtype=float)).all()
    assert np.asarray(multiplier.lines[1].get_ydata()) == pytest.approx(np.full(10, 0.1))
    assert imread(tmp_path / "train.png").std() > 0.01


def test_a_running_mean_leaves_out_what_is_not_known() -> None:
    nan = float("nan")
    values = np.array([1.0, nan, 3.0, nan, nan, nan, 8.0])
    expected = [1.0, 1.0, 2.0, 3.0, 3.0, nan, 8.0]
    assert running_mean(values, 3) == pytest.approx(expected, nan_ok=True)


def test_statistics_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.jsonl"
    with pytest.raises(InvalidRequestError, match=r"none\.jsonl cannot be read"):
        read_statistics(missing)
    missing.write_text("")
    with pytest.raises(InvalidRequestError, match="has no line"):
        read_statistics(missing)
    missing.write_text("nonsense\n")
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_statistics(missing)


def test_a_plot_of_nothing_or_to_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="one or more"):
        plot_against_cost([], tmp_path / "x.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        plot_against_cost(RESULTS, tmp_path / "file" / "x.png")
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        plot_against_cost(RESULTS, tmp_path / "x.nonsense")
