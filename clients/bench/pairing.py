"""Arms of result files, unit by unit: means, and paired differences where both have a unit."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from clients.bench.asked import Asked, alike, asked_of, part_of, unlike
from clients.bench.functional.passk import pass_at_k
from clients.bench.statistics import Difference, cluster_by, cluster_of, paired_difference
from clients.results import Header, Key, Record

# They tell variants and repeats apart, not units.
_NOT_UNIT = ("arm", "sample")
_PASS = "pass@"


@dataclass(frozen=True, slots=True)
class Column:
    """The records of one arm of one file.

    Args:
        title: heads the column.
        records: of this arm; none where it has not begun.
        unit_fields: fields that together name what is measured.
        asked: what the units of the whole file were asked.
        file: that it is of, as it is called in titles.
    """

    title: str
    records: Sequence[Record]
    unit_fields: tuple[str, ...]
    asked: Asked = field(default_factory=Asked)
    file: str = ""

    def units(self, metric: str) -> dict[Key, float]:
        """The metric by unit; units that lack it are left out.

        It is the mean over a unit's samples; `pass@k` is estimated from them, and units with fewer
        than k are left out.
        """
        k = k_of(metric)
        values: dict[Key, list[float]] = defaultdict(list)
        for record in self.records:
            value = record.get(metric if k is None else "passed")
            if value is not None:
                values[self.unit(record)].append(float(value))
        if k is None:
            return {unit: sum(each) / len(each) for unit, each in values.items()}
        return {
            unit: pass_at_k(len(each), int(sum(each)), k)
            for unit, each in values.items()
            if len(each) >= k
        }

    def unit(self, record: Mapping[str, Any]) -> Key:
        """What names a record's unit."""
        return tuple(record.get(name) for name in self.unit_fields)

    def mean(self, metric: str) -> float | None:
        """Over units; None where no unit has the metric."""
        return _mean(list(self.units(metric).values()))

    def samples(self) -> int:
        """Of the unit that has most."""
        return max(Counter(self.unit(record) for record in self.records).values(), default=0)

    def only(self, **fields: Any) -> Column:
        """The records in which these fields have these values."""
        kept = [r for r in self.records if all(r.get(k) == v for k, v in fields.items())]
        return replace(self, records=kept)

    def answered_by(self) -> dict[str, int]:
        """Answers by whose weights gave them, `session` or `base`, where records tell."""
        return dict(Counter(filter(None, map(answered_by, self.records))))


def k_of(metric: str) -> int | None:
    """The k of `pass@k`; None for other metrics."""
    number = metric.removeprefix(_PASS)
    return int(number) if metric.startswith(_PASS) and number.isdecimal() else None


def answered_by(record: Mapping[str, Any]) -> str | None:
    """Whose weights gave an answer; None where nothing was to choose, or no answer asked for."""
    ttt = record.get("ttt")
    choice = ttt.get("choice") if isinstance(ttt, Mapping) else None
    read = choice.get("read") if isinstance(choice, Mapping) else None
    told = record.get("answered_by", read)
    return told if isinstance(told, str) else None


def columns(header: Header, records: Sequence[Record], prefix: str = "") -> list[Column]:
    """One column per arm, in the file's order, without what was done to warm up.

    Arms that were to be run but have no record yet have a column without any; so has a file.

    Args:
        header: of the file.
        records: of the file.
        prefix: of the titles.
    """
    asked = asked_of(header, records)
    fields = tuple(name for name in header.key_fields if name not in _NOT_UNIT)
    by_arm: dict[str | None, list[Record]] = defaultdict(list)
    by_arm |= {arm: [] for arm in header.settings.get("arms") or ()}
    for record in records:
        if not record.get("warmup"):
            by_arm[record.get("arm")].append(record)
    return [
        Column(" ".join(filter(None, (prefix, arm))) or header.kind, each, fields, asked, prefix)
        for arm, each in (by_arm or {None: []}).items()
    ]


def common(base: Column, other: Column, metric: str) -> list[Key]:
    """Units that both have and were asked alike, in the base's order."""
    there = other.units(metric)
    both = [unit for unit in base.units(metric) if unit in there]
    if not unlike(base.asked, other.asked):
        return both
    parts = {base.unit(record): part_of(record) for record in base.records}
    return [unit for unit in both if alike(base.asked, other.asked, parts[unit])]


def mean_over(column: Column, metric: str, units: Sequence[Key]) -> float | None:
    """The mean over some of a column's units; None over none."""
    values = column.units(metric)
    return _mean([values[unit] for unit in units])


def difference(base: Column, other: Column, metric: str, seed: int) -> Difference | None:
    """Mean of other - base over the units that both have; None where there are none."""
    here, there = base.units(metric), other.units(metric)
    both = common(base, other, metric)
    by_unit = {base.unit(record): record for record in base.records}
    by = cluster_by([by_unit[unit] for unit in both])
    return paired_difference(
        [there[unit] - here[unit] for unit in both],
        [cluster_of(by_unit[unit], by, unit) for unit in both],
        seed,
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
