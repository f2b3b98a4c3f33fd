"""What the repository benchmark says in the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from clients.bench.pairing import (
    INTERVALS,
    Column,
    columns,
    difference,
    markdown,
    show,
    show_difference,
)
from clients.bench.repo_targets import KINDS
from clients.bench.statistics import CONFIDENCE, cluster_by
from clients.results import Better, Header, Record

KEY_FIELDS = ("repository", "arm", "unit")
#: Of targets, and `unrelated_loss` of unrelated code.
METRICS: dict[str, Better] = {
    "exact": "higher",
    "edit_similarity": "higher",
    "identifier_exact": "higher",
    "identifier_f1": "higher",
    "loss": "lower",
    "loss_per_char": "lower",
    "answer_loss": "lower",
    "prompt_tokens": "lower",
    "completion_tokens": "lower",
    "read_seconds": "lower",
    "seconds": "lower",
    "unrelated_loss": "lower",
}
_BASE = "off"
# Columns of the table, with the difference to `off` behind each.
_COMPARED = ("exact", "edit_similarity", "identifier_f1", "loss", "answer_loss", "unrelated_loss")
_MAIN = ("exact", "edit_similarity", "loss")
_ALONE = ("prompt_tokens", "completion_tokens", "read_seconds", "seconds")


def summary(header: Header, records: Sequence[Record]) -> dict[str, Any]:
    """Everything by arm, for --json; differences are to `off`."""
    targets = [record for record in records if record["record"] == "target"]
    by_arm = {column.title: column for column in columns(header, records)}
    base = by_arm.get(_BASE)
    return {
        **header.as_dict(),
        "clustered_by": cluster_by(targets),
        "confidence": CONFIDENCE,
        "arms": {name: _arm(column, base, header.seed) for name, column in by_arm.items()},
    }


def _arm(column: Column, base: Column | None, seed: int) -> dict[str, Any]:
    return {
        "targets": len(column.only(record="target").records),
        "means": {metric: column.mean(metric) for metric in METRICS},
        "differences": _differences(column, base, seed),
        "learning": _learning(column.only(record="lesson").records),
        "answered_by": _answered_by(column),
        "by_kind": {
            kind: {metric: column.only(kind=kind).mean(metric) for metric in METRICS}
            for kind in KINDS
        },
        "by_repository": {
            name: {metric: column.only(repository=name).mean(metric) for metric in METRICS}
            for name in dict.fromkeys(record["repository"] for record in column.records)
        },
    }


def _answered_by(column: Column) -> dict[str, int]:
    """Targets by whose weights answered, of arms that have a session."""
    answered = [record.get("answered_by") for record in column.only(record="target").records]
    return dict(Counter(each for each in answered if each is not None))


def _differences(column: Column, base: Column | None, seed: int) -> dict[str, Any] | None:
    if base is None or column is base:
        return None
    found = {metric: difference(base, column, metric, seed) for metric in METRICS}
    return {metric: each.as_dict() if each else None for metric, each in found.items()}


def _learning(lessons: Sequence[Record]) -> dict[str, Any] | None:
    """What was taught, and at what price; means are over chunks."""
    chunks = sum(lesson["chunks"] for lesson in lessons)
    if not chunks:
        return None
    actions: Counter[str] = Counter()
    for lesson in lessons:
        # Files of earlier versions have none.
        actions.update(lesson.get("actions", {}))
    return {
        "tokens": sum(lesson["tokens"] for lesson in lessons),
        "learned_tokens": sum(lesson["learned_tokens"] for lesson in lessons),
        "chunks": chunks,
        "actions": dict(actions),
        "update_rate": sum(lesson["updates"] for lesson in lessons) / chunks,
        "nominal": sum(lesson["nominal"] * lesson["chunks"] for lesson in lessons) / chunks,
        "measured": sum(lesson["measured"] * lesson["chunks"] for lesson in lessons) / chunks,
        "seconds": sum(lesson["adapt_seconds"] for lesson in lessons),
    }


def table(header: Header, records: Sequence[Record]) -> str:
    """The Markdown that a user sees."""
    by_arm = {column.title: column for column in columns(header, records)}
    base = by_arm.get(_BASE)
    heads = ["arm", "targets"]
    for metric in _COMPARED:
        heads += [metric.replace("_", " "), "Δ"]
    heads += [metric.replace("_", " ") for metric in _ALONE]
    heads += ["by session", "learned tokens", "update rate", "cost", "learning s"]
    rows = [_row(column, base, header.seed) for column in by_arm.values()]
    targets = [record for record in records if record["record"] == "target"]
    resampled = {"repository": "repositories", "file": "files", "unit": "targets"}
    note = (
        f"Δ: paired difference to `{_BASE}` with its {CONFIDENCE:.0%} interval over "
        f"{resampled[cluster_by(targets)]} ({INTERVALS}). Loss in nats per token; "
        f"unrelated loss of `{_BASE}` is that of every session before it has learned. "
        "Cost: nominal, per chunk, × forward. Loss: by the session's weights; answer loss: by "
        "those that answered, the session's or, as the prompt has it, the base model's."
    )
    return "\n\n".join(
        [
            markdown(heads, rows),
            note,
            _not_taught(header),
            *_followers(by_arm),
            "By kind: exact match / edit similarity / loss.",
            _by(list(by_arm.values()), "kind", KINDS),
            "By repository: the same.",
            _by(list(by_arm.values()), "repository", header.settings["repositories"]),
        ]
    )


def _followers(arms: Collection[str]) -> list[str]:
    """What must be known of arms that follow another, where there are any."""
    if not any("=" in name for name in arms):
        return []
    return [
        "`random` and `fixed` get what the arm in parentheses has spent; compare their update "
        "rates: `random` loses draws that its budget refuses, and `fixed` updates the first chunks "
        "of a lesson rather than every so many. `=rate` follows the share of chunks updated, with "
        "UPDATE_1 alone; `=time` the measured cost."
    ]


def _not_taught(header: Header) -> str:
    dropped = header.settings.get("dropped", {})
    counts = [f"{len(dropped.get(name, ()))} of {name}" for name in header.settings["repositories"]]
    return (
        "Files left out of what is taught, since they hold hidden text or are nearly copies of a "
        f"file with targets: {', '.join(counts)}."
    )


def _by(arms: Sequence[Column], name: str, values: Sequence[str]) -> str:
    """A table with the main metrics of every arm, for each value of a field of the records."""
    rows = []
    for column in arms:
        row = [column.title]
        for value in values:
            part = column.only(**{name: value})
            row.append(" / ".join(show(part.mean(metric), metric) for metric in _MAIN))
        rows.append(row)
    return markdown(["arm", *values], rows)


def _row(column: Column, base: Column | None, seed: int) -> list[str]:
    row = [column.title, str(len(column.only(record="target").records))]
    for metric in _COMPARED:
        row.append(show(column.mean(metric), metric))
        own = base is None or column is base
        row.append(
            "" if own or base is None else show_difference(difference(base, column, metric, seed))
        )
    row += [show(column.mean(metric), metric) for metric in _ALONE]
    learning = _learning(column.only(record="lesson").records)
    if learning is None:
        return [*row, "", "", "", "", ""]
    answered = _answered_by(column)
    return [
        *row,
        f"{answered.get('session', 0)} of {sum(answered.values())}",
        f"{learning['learned_tokens']:,}",
        f"{learning['update_rate']:.0%}",
        f"{learning['nominal']:.2f}",
        f"{learning['seconds']:.1f}",
    ]
