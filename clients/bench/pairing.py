"""Arms of result files, unit by unit: means, and paired differences where both have a unit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clients.bench.statistics import (
    LEAST_RESAMPLED,
    Difference,
    cluster_by,
    cluster_of,
    paired_difference,
)
from clients.results import Header, Key, Record

# They tell variants and repeats apart, not units.
_NOT_UNIT = ("arm", "sample")


@dataclass(frozen=True, slots=True)
class Column:
    """The records of one arm of one file.

    Args:
        title: heads the column.
        records: of this arm.
        unit_fields: fields that together name what is measured.
    """

    title: str
    records: Sequence[Record]
    unit_fields: tuple[str, ...]

    def units(self, metric: str) -> dict[Key, float]:
        """The metric by unit, as mean over its samples; units that lack it are left out."""
        values: dict[Key, list[float]] = defaultdict(list)
        for record in self.records:
            if record.get(metric) is not None:
                values[self.unit(record)].append(float(record[metric]))
        return {unit: sum(each) / len(each) for unit, each in values.items()}

    def unit(self, record: Mapping[str, Any]) -> Key:
        """What names a record's unit."""
        return tuple(record.get(name) for name in self.unit_fields)

    def mean(self, metric: str) -> float | None:
        """Over units; None where no unit has the metric."""
        values = self.units(metric).values()
        return sum(values) / len(values) if values else None

    def only(self, **fields: Any) -> Column:
        """The records in which these fields have these values."""
        kept = [r for r in self.records if all(r.get(k) == v for k, v in fields.items())]
        return Column(self.title, kept, self.unit_fields)


def columns(header: Header, records: Sequence[Record], prefix: str = "") -> list[Column]:
    """One column per arm, in the file's order, without what was done to warm up.

    Args:
        header: of the file.
        records: of the file.
        prefix: of the titles.
    """
    fields = tuple(name for name in header.key_fields if name not in _NOT_UNIT)
    by_arm: dict[str | None, list[Record]] = defaultdict(list)
    for record in records:
        if not record.get("warmup"):
            by_arm[record.get("arm")].append(record)
    return [
        Column(" ".join(filter(None, (prefix, arm))) or header.kind, each, fields)
        for arm, each in by_arm.items()
    ]


def difference(base: Column, other: Column, metric: str, seed: int) -> Difference | None:
    """Mean of other - base over the units that both have; None where there are none."""
    here, there = base.units(metric), other.units(metric)
    both = [unit for unit in here if unit in there]
    by_unit = {base.unit(record): record for record in base.records}
    by = cluster_by([by_unit[unit] for unit in both])
    return paired_difference(
        [there[unit] - here[unit] for unit in both],
        [cluster_of(by_unit[unit], by, unit) for unit in both],
        seed,
    )


def show(value: float | None, metric: str) -> str:
    """A mean as it stands in a table."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 or "tokens" in metric else f"{value:.3f}"


def show_difference(value: Difference | None) -> str:
    """A difference as it stands in a table."""
    if value is None:
        return "–"
    if value.low is None or value.high is None:
        return f"{value.estimate:+.3f} [–]"
    by = "; t" if value.method == "t" else ""
    return f"{value.estimate:+.3f} [{value.low:+.3f}, {value.high:+.3f}{by}]"


#: What the ends of `show_difference` mean.
INTERVALS = (
    f"by BCa bootstrap, or, marked t, where there are fewer than {LEAST_RESAMPLED} to resample, by "
    "Student's t; [–] where all say the same or there is but one, so that none can be given"
)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )
