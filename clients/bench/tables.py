"""Tables and texts that are read in a terminal as well as where Markdown is drawn."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from clients.bench.statistics import LEAST_RESAMPLED, Difference

#: Characters of a line; a table may be wider by what a long name of a file takes.
WIDTH = 100
# From here on, thousandths say nothing.
_LARGE = 1000
_MARKS = {"higher": "↑", "lower": "↓"}

#: What the ends of `show_difference` mean.
INTERVALS = (
    f"by BCa bootstrap, or, marked t, where there are fewer than {LEAST_RESAMPLED} to resample, by "
    "Student's t; [–] where all say the same or there is but one, so that none can be given"
)


def show(value: float | None, metric: str) -> str:
    """A mean as it stands in a table."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= _LARGE or "tokens" in metric else f"{value:.3f}"


def show_difference(value: Difference | None) -> str:
    """A difference as it stands in a table."""
    if value is None:
        return "–"
    form = "+,.0f" if abs(value.estimate) >= _LARGE else "+.3f"
    if value.low is None or value.high is None:
        return f"{value.estimate:{form}} [–]"
    by = "; t" if value.method == "t" else ""
    return f"{value.estimate:{form}} [{value.low:{form}}, {value.high:{form}}{by}]"


def marked(name: str, better: str) -> str:
    """A metric's name, and which way is better."""
    return f"{name} ({_MARKS.get(better, better)})"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns stand below each other also where it isn't drawn.

    The first column is text, the others are numbers.
    """
    lines = [[_cell(cell) for cell in line] for line in (heads, *rows)]
    widths = [max(4, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (
        _aligned(lines[0], widths), rule, *(_aligned(line, widths) for line in lines[1:])
    ))  # fmt: skip


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *others = line
    return [
        first.ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)),
    ]


def sectioned(heads: Sequence[str], sections: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """One table of several blocks of rows, each below its title."""
    rows: list[Sequence[str]] = []
    for title, block in sections.items():
        rows += [[f"**{title}**", *[""] * (len(heads) - 1)], *block]
    return markdown(heads, rows)


def side_by_side(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a column for each thing compared; several tables where one would be too wide."""
    shown: list[int] = []
    for place in range(1, len(heads)):
        wider = _part(heads, rows, [*shown, place])
        if shown and len(wider.partition("\n")[0]) > WIDTH:
            rest = [n for n in range(1, len(heads)) if n not in shown]
            others = ([line[0], *(line[n] for n in rest)] for line in (heads, *rows))
            return _part(heads, rows, shown) + "\n\n" + side_by_side(next(others), list(others))
        shown.append(place)
    return _part(heads, rows, shown)


def _part(heads: Sequence[str], rows: Sequence[Sequence[str]], shown: Sequence[int]) -> str:
    first, *others = [[line[0], *(line[n] for n in shown)] for line in (heads, *rows)]
    return markdown(first, others)


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph in lines of `WIDTH`; all but the first are indented."""
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
