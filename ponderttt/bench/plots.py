"""Plots of the results: the ratios with their targets, and how costs grow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ponderttt.bench.results import Results
from ponderttt.errors import UnavailableError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(results: Results) -> list[Path]:
    """Write the plots for which there are results beside `bench.json`; returns their paths.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    paths = []
    compared = [c for row in results.rows.values() for c in row["comparisons"] if "ratio" in c]
    if compared:
        figure = _figure(9.0, 1.2 + 0.45 * len(compared))
        _ratios(figure, compared)
        paths.append(_save(figure, results.directory / "ratios.png"))
    if results.scaling:
        figure = _figure(9.0, 3.2 * ((len(results.scaling) + 1) // 2))
        _curves(figure, list(results.scaling.values()))
        paths.append(_save(figure, results.directory / "scaling.png"))
    return paths


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnavailableError(
            "plots need matplotlib: `pip install 'ponderttt[bench]'`; table and JSON are written"
        ) from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path


def _ratios(figure: Figure, compared: list[dict[str, Any]]) -> None:
    """A point with quartiles per comparison; grey: the target, hollow: the goal."""
    axes = figure.subplots()
    for at, comparison in enumerate(compared):
        ratio = comparison["ratio"]
        colour = {True: "tab:green", False: "tab:red", None: "tab:blue"}[comparison["met"]]
        axes.plot([ratio["low"], ratio["high"]], [at, at], color=colour, linewidth=2)
        axes.plot(ratio["median"], at, "o", color=colour)
        for limit, face in ((comparison["at_least"], "0.6"), (comparison["goal"], "none")):
            if limit:
                axes.plot(limit, at, "|", color="0.4", markersize=14)
                axes.plot(limit, at, "D", color="0.4", markerfacecolor=face, markersize=5)
    names = [f"{c['what']}\nagainst {c['against']}" for c in compared]
    axes.set_yticks(range(len(compared)), names, fontsize=7)
    axes.invert_yaxis()
    # Memory may have shrunk, which has no logarithm.
    positive = all(c["ratio"]["low"] > 0 for c in compared)
    axes.set_xscale("log" if positive else "symlog")
    axes.axvline(1.0, color="0.85", zorder=0)
    axes.set_xlabel("ratio; grey diamond: target, hollow: goal")


def _curves(figure: Figure, curves: list[dict[str, Any]]) -> None:
    grid = figure.subplots((len(curves) + 1) // 2, 2, squeeze=False).flatten()
    for axes, curve in zip(grid, curves, strict=False):
        values = [point[curve["varies"]] for point in curve["points"]]
        for kind, label in (("decode", "decode step"), ("write", "write (UPDATE_1)")):
            middle = [point[kind]["median"] * 1e3 for point in curve["points"]]
            low = [point[kind]["low"] * 1e3 for point in curve["points"]]
            high = [point[kind]["high"] * 1e3 for point in curve["points"]]
            (line,) = axes.plot(values, middle, "o-", label=label)
            axes.fill_between(values, low, high, alpha=0.2, color=line.get_color())
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        # A step and a write are far apart; on both scales, cost by size is a slope of one.
        axes.set_yscale("log")
        axes.set_xlabel(curve["varies"])
        axes.set_ylabel("ms, all sessions at once")
        axes.legend(frameon=False, fontsize=8)
    for axes in grid[len(curves) :]:
        axes.set_visible(False)
