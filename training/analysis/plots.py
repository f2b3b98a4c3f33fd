"""Plots of an evaluation and of a training run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ponderttt.adaptation.actions import CostModelName
from ponderttt.errors import InvalidRequestError
from training.analysis.outcomes import MethodResult

Array = NDArray[np.float64]

_MARKERS = "osD^vP*Xhp<>"
_STYLES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)))
_COLOURS = mpl.color_sequences["tab10"]

# Of a budget's statistics, and whether they are smoothed.
_CURVES = {"reward": True, "cost": True, "multiplier": False}


def plot_against_cost(
    results: Sequence[MethodResult],
    path: Path,
    cost_model: CostModelName = "nominal",
    budgets: Sequence[float] = (),
    skip_loss: float | None = None,
) -> None:
    """What every method saved against what it spent: a line per method, a point per budget.

    Bars are the 95% intervals of the gain over repositories.

    Args:
        results: of one or more methods; the first method is drawn on top.
        path: of the image; its suffix says which kind.
        cost_model: of the horizontal axis.
        budgets: drawn as grey lines, where they are counted in that cost model.
        skip_loss: nats per token where nothing is learned; given, the vertical axis is the loss,
            `skip_loss` less the gain.
    Raises:
        InvalidRequestError: no result, or the path cannot be written.
    """
    if not results:
        raise InvalidRequestError("results", "give one or more")
    figure = Figure(figsize=(8.0, 5.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    for budget in budgets:
        axes.axvline(budget, color="0.88", linewidth=1, zorder=0)
    axes.axhline(skip_loss or 0.0, color="0.6", linewidth=1, zorder=0)
    for index, method in enumerate(dict.fromkeys(result.method for result in results)):
        rows = sorted((r for r in results if r.method == method), key=lambda row: row.budget)
        _method_line(axes, rows, cost_model, skip_loss, index)
    note = "; grey lines are the budgets" if budgets else ""
    axes.set_xlabel(f"mean cost per chunk, × forward ({cost_model}){note}")
    axes.set_ylabel("nats saved per 1,000 tokens" if skip_loss is None else "loss, nats per token")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    _save(figure, path)


def _method_line(
    axes: Axes,
    rows: Sequence[MethodResult],
    cost_model: CostModelName,
    skip_loss: float | None,
    index: int,
) -> None:
    gains = [row.gain for row in rows]
    middle, low, high = (
        # Without an interval there is no bar.
        np.array([g.estimate if end is None else end for g, end in zip(gains, ends, strict=True)])
        for ends in ([None] * len(gains), [g.low for g in gains], [g.high for g in gains])
    )
    if skip_loss is None:
        middle, low, high = middle * 1000, low * 1000, high * 1000
    else:
        middle, low, high = skip_loss - middle, skip_loss - high, skip_loss - low
    axes.errorbar(
        [row.mean_cost[cost_model] for row in rows],
        middle,
        # A BCa interval may lie beside its estimate.
        yerr=np.maximum([middle - low, high - middle], 0.0),
        label=rows[0].method,
        color=_COLOURS[index % len(_COLOURS)],
        # Hollow, and broken lines but for the first: methods that coincide can all be seen.
        marker=_MARKERS[index % len(_MARKERS)],
        markerfacecolor=_COLOURS[0] if index == 0 else "none",
        linestyle="-" if index == 0 else _STYLES[index % len(_STYLES)],
        linewidth=2.0 if index == 0 else 1.3,
        markersize=6,
        elinewidth=0.9,
        capsize=3,
        zorder=3.0 if index == 0 else 2.0,
    )


def plot_training(statistics: Path, path: Path) -> None:
    """Reward, cost and multiplier of a training run, by budget, over environment steps.

    Thin lines are single iterations, thick ones their running mean; dashed lines are the budgets.

    Args:
        statistics: the `statistics.jsonl` that training wrote; a last line that was cut off is
            left out.
        path: of the image; its suffix says which kind.
    Raises:
        InvalidRequestError: the file cannot be read, is damaged or has no line.
    """
    rows = read_statistics(statistics)
    figure = Figure(figsize=(8.0, 8.0), dpi=150, layout="constrained")
    panels: Sequence[Axes] = figure.subplots(3, 1, sharex=True)
    steps = np.array([row["steps"] for row in rows], dtype=np.float64)
    for index, budget in enumerate(row["budget"] for row in rows[0]["budgets"]):
        colour = _COLOURS[index % len(_COLOURS)]
        for axes, (key, noisy) in zip(panels, _CURVES.items(), strict=True):
            # None where no step was taken under the budget.
            values = np.array([row["budgets"][index][key] for row in rows], dtype=np.float64)
            width = max(len(rows) // 20, 1) if noisy else 1
            axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
            mean = running_mean(values, width)
            axes.plot(steps, mean, color=colour, linewidth=1.8, label=f"budget {budget:g}")
        panels[1].axhline(budget, color=colour, linestyle="--", linewidth=1)
    labels = ("reward per step", "cost per step, × forward", "multiplier λ")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label)
        axes.grid(color="0.92")
    panels[-1].set_xlabel("environment steps")
    panels[-1].xaxis.set_major_formatter("{x:,.0f}")
    panels[0].legend(frameon=False, fontsize=9)
    _save(figure, path)


def read_statistics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run; see `plot_training`."""
    try:
        lines = path.read_text().split("\n")[:-1]
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise InvalidRequestError("statistics", f"{path} cannot be read: {error}") from error
    if not rows:
        raise InvalidRequestError("statistics", f"{path} has no line; train first")
    return rows


def running_mean(values: Array, width: int) -> Array:
    """[N]: mean of each value and the width - 1 before it, NaNs left out; NaN where all are."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    seen = counts[ends] - counts[starts]
    return np.divide(sums[ends] - sums[starts], seen, np.full(len(values), np.nan), where=seen > 0)


def _save(figure: Figure, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (OSError, ValueError) as error:
        # A ValueError names the kinds of image there are.
        raise InvalidRequestError("plot", f"{path} cannot be written: {error}") from error
