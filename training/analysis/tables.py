"""Results as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ponderttt.adaptation.actions import Action
from training.analysis.outcomes import Comparison, MethodResult
from training.analysis.statistics import Interval


def markdown(results: Sequence[MethodResult], comparisons: Sequence[Comparison]) -> str:
    """One table of the methods, and one of the differences where there are any."""
    tables = [_methods(results)]
    if comparisons:
        tables.append(_differences(comparisons))
    return "\n\n".join("\n".join(table) for table in tables) + "\n"


def _methods(results: Sequence[MethodResult]) -> Iterator[str]:
    yield from _head(
        "budget",
        "method",
        "nats saved per 1,000 tokens",
        "share of the oracle's gain",
        "nominal cost",
        "measured cost",
        "dearest 64 chunks",
        "SKIP / UPDATE_1 / UPDATE_2 / UPDATE_4",
    )
    for result in results:
        chunks = sum(result.actions.values())
        yield _row(
            f"{result.budget:g}",
            result.method,
            _interval(result.gain, 1000, 1),
            "–" if result.share is None else _interval(result.share, 100, 1, "%"),
            f"{result.mean_cost['nominal']:.2f}",
            f"{result.mean_cost['measured']:.2f}",
            f"{result.worst_window:.2f}",
            " / ".join(f"{result.actions[action.name] / chunks:.0%}" for action in Action),
        )


def _differences(comparisons: Sequence[Comparison]) -> Iterator[str]:
    yield from _head("budget", "difference", "nats saved per 1,000 tokens", "clear of zero")
    for row in comparisons:
        yield _row(
            f"{row.budget:g}",
            f"{row.method} − {row.baseline}",
            _interval(row.difference, 1000, 1),
            "yes" if row.difference.clear_of_zero else "no",
        )


def _head(*cells: str) -> tuple[str, str]:
    return _row(*cells), _row(*["---"] * len(cells))


def _row(*cells: str) -> str:
    # A bar ends a cell.
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _interval(interval: Interval, unit: float, digits: int, sign: str = "") -> str:
    estimate, *ends = (
        None if value is None else f"{value * unit:.{digits}f}"
        for value in (interval.estimate, interval.low, interval.high)
    )
    return f"{estimate}{sign}" if None in ends else f"{estimate}{sign} ({ends[0]} … {ends[1]})"
