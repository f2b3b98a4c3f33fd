"""A load run as four plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clients.load.summary import Bounds, current
from clients.results import Header, Record
from ponderttt.errors import InvalidRequestError, PonderError, UnavailableError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "ok": "tab:blue", "rejected": "tab:orange", "timeout": "tab:purple", "failed": "tab:red",
}  # fmt: skip
_BINS = 40


def require_picture(path: Path) -> None:
    """Say before the work that there will be no plot.

    Args:
        path: of the picture.
    Raises:
        UnavailableError: matplotlib is not installed.
        InvalidRequestError: the path's suffix is that of no picture.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise UnavailableError(
            "--plot needs matplotlib: `pip install 'ponderttt[bench]'`"
        ) from error
    if path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise InvalidRequestError("--plot", f"{path} is no picture; give .png, .svg or .pdf")


def draw(header: Header, records: Sequence[Record], bounds: Bounds, path: Path) -> None:
    """Write the plots to one picture.

    Args:
        header, records: of the run; requests to warm up are left out.
        bounds: shown as lines.
        path: its suffix names the format.
    Raises:
        UnavailableError: matplotlib is not installed.
        InvalidRequestError: the suffix is that of no picture.
        PonderError: the picture can't be written.
    """
    require_picture(path)
    from matplotlib.figure import Figure

    counted = [record for record in current(records) if not record["warmup"]]
    figure = Figure(figsize=(10, 7), dpi=130, layout="constrained")
    (first, token), (time, busy) = figure.subplots(2, 2)
    _cumulative(first, counted, "ttft", bounds.ttft, "time to first token")
    _cumulative(token, counted, "tpot", bounds.tpot, "time per output token")
    _timeline(time, counted, bounds.seconds)
    _traffic(busy, counted)
    figure.suptitle(f"{header.model}: {header.settings['load']}", fontsize=11)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise PonderError(f"{path} can't be written: {error}") from error


def _cumulative(
    axes: Axes, records: Sequence[Record], name: str, bound: float | None, what: str
) -> None:
    """Share of answered requests that took no longer."""
    values = [record[name] * 1e3 for record in records if record[name] is not None]
    if values:
        axes.ecdf(values, color=_COLOURS["ok"])
    if bound is not None:
        axes.axvline(bound * 1e3, color="0.4", linestyle="--", linewidth=1, label="bound")
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    for share in (0.5, 0.9, 0.99):
        axes.axhline(share, color="0.9", linewidth=0.8, zorder=0)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(f"{what}, ms")
    axes.set_ylabel("share of answers")


def _timeline(axes: Axes, records: Sequence[Record], bound: float | None) -> None:
    """End-to-end time of every request by when it was due."""
    for outcome, colour in _COLOURS.items():
        chosen = [record for record in records if record["outcome"] == outcome]
        if chosen:
            axes.plot(
                [record["due"] for record in chosen],
                [record["elapsed"] for record in chosen],
                "o" if outcome == "ok" else "x",
                color=colour,
                markersize=4,
                label=f"{outcome} ({len(chosen)})",
            )
    if bound is not None:
        axes.axhline(bound, color="0.4", linestyle="--", linewidth=1, label="bound")
    if records:
        axes.legend(frameon=False, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("due, s after the beginning")
    axes.set_ylabel("end to end, s")


def _traffic(axes: Axes, records: Sequence[Record]) -> None:
    """Requests at once, and tokens per second: those of an answer spread over its generation."""
    import numpy as np

    axes.set_xlabel("s after the beginning")
    axes.set_ylabel("requests at once", color="tab:gray")
    if not records:
        return
    starts = np.array([record["due"] for record in records])
    ends = starts + np.array([record["elapsed"] for record in records])
    moments = np.linspace(starts.min(), ends.max(), 400)
    running = [((starts <= at) & (ends > at)).sum() for at in moments]
    axes.fill_between(moments, running, step="mid", color="tab:gray", alpha=0.25, linewidth=0)
    axes.step(moments, running, where="mid", color="tab:gray", linewidth=1)
    axes.set_ylim(bottom=0)
    edges = np.linspace(starts.min(), ends.max(), _BINS + 1)
    tokens = np.zeros(_BINS)
    for record in records:
        if record["ttft"] is None:
            continue
        begin, end = record["due"] + record["ttft"], record["due"] + record["seconds"]
        inside = np.clip(np.minimum(edges[1:], end) - np.maximum(edges[:-1], begin), 0, None)
        if inside.sum() > 0:
            tokens += record["completion_tokens"] * inside / inside.sum()
    width = np.diff(edges)
    other = axes.twinx()
    other.step(edges[:-1] + width / 2, tokens / width, where="mid", color=_COLOURS["ok"])
    other.set_ylabel("output tokens per second", color=_COLOURS["ok"])
    other.set_ylim(bottom=0)
    # Axes that come later are drawn above, and would hide these.
    axes.set_zorder(other.get_zorder() + 1)
    axes.patch.set_visible(False)
