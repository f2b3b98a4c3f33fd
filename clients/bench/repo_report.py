"""What the repository benchmark says in the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from clients import shapes
from clients.bench.pairing import Column, columns, difference
from clients.bench.repo_targets import KINDS
from clients.bench.statistics import CONFIDENCE, cluster_by
from clients.bench.tables import (
    INTERVALS,
    markdown,
    marked,
    sectioned,
    show,
    show_difference,
    wrapped,
)
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
# So many empty answers are no accident.
_TELLING = 4
# Blocks of the table, with the difference to `off`.
_COMPARED = ("exact", "edit_similarity", "identifier_f1", "loss", "answer_loss", "unrelated_loss")
_MAIN = ("exact", "edit_similarity", "loss")
_ALONE = ("prompt_tokens", "completion_tokens", "read_seconds", "seconds")


_RECORDS = {
    "target": shapes.fields(
        {"kind": shapes.text, "file": shapes.text, "exact": shapes.boolean,
         "edit_similarity": shapes.number, "completion": shapes.text}
    ),
    "lesson": shapes.fields(
        dict.fromkeys(("tokens", "learned_tokens", "chunks", "updates", "version"), shapes.count)
        | dict.fromkeys(("nominal", "measured", "adapt_seconds"), shapes.number)
    ),
    "unrelated": shapes.fields({"unrelated_loss": shapes.number}),
    "retaught": shapes.fields({"updates": shapes.count, "version": shapes.count}),
}  # fmt: skip


def record_check(record: Any) -> shapes.Fault | None:
    """What is wrong with a record of the result file; see `clients.shapes`."""
    kind = record.get("record")
    if kind not in _RECORDS:
        return ".record", f"is {kind!r}, not {', '.join(_RECORDS)}"
    return _RECORDS[kind](record)


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
        "answered_by": column.only(record="target").answered_by(),
        "by_kind": {
            kind: {metric: column.only(kind=kind).mean(metric) for metric in METRICS}
            for kind in KINDS
        },
        "by_repository": {
            name: {metric: column.only(repository=name).mean(metric) for metric in METRICS}
            for name in dict.fromkeys(record["repository"] for record in column.records)
        },
    }


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
    arms = list(by_arm.values())
    targets = [record for record in records if record["record"] == "target"]
    resampled = {"repository": "repositories", "file": "files", "unit": "targets"}
    note = (
        f"Δ: paired difference to `{_BASE}` with its {CONFIDENCE:.0%} interval over "
        f"{resampled[cluster_by(targets)]} ({INTERVALS}). Loss in nats per token, by the session's "
        "weights; answer loss: by those that answered, the session's or, as the prompt has it, the "
        f"base model's. Unrelated loss of `{_BASE}` is that of every session before it has learned."
    )
    return "\n\n".join(
        [
            *map(wrapped, _empty(arms)),
            _compared(arms, by_arm.get(_BASE), header.seed),
            wrapped(note),
            "Means over targets:",
            markdown(
                ["arm", "targets", *map(_spelt, _ALONE)],
                [
                    [
                        column.title,
                        str(len(column.only(record="target").records)),
                        *(show(column.mean(metric), metric) for metric in _ALONE),
                    ]
                    for column in arms
                ],
            ),
            *_learned(arms),
            wrapped(_not_taught(header)),
            *_followers(by_arm),
            _by(arms, "kind", KINDS),
            _by(arms, "repository", header.settings["repositories"]),
        ]
    )


def _empty(arms: Sequence[Column]) -> list[str]:
    """Warnings of what measures nothing."""
    told = []
    for column in arms:
        for kind in KINDS:
            records = column.only(kind=kind).records
            if len(records) < _TELLING or any(record["completion"].strip() for record in records):
                continue
            # Files of earlier versions have no whole answers.
            blank = not any(str(record.get("answer", "?")).strip() for record in records)
            what = "are empty" if blank else "came to nothing after cutting"
            told.append(
                f"**All {len(records)} answers of kind {kind} in arm {column.title} {what}**: "
                "their figures tell nothing but that. Does the server continue a prompt as it "
                "stands?"
            )
    return told


def _compared(arms: Sequence[Column], base: Column | None, seed: int) -> str:
    """A block per metric, with a row per arm; metrics that no arm has are left out."""
    sections = {}
    for metric in _COMPARED:
        rows = [
            [
                column.title,
                show(column.mean(metric), metric),
                str(len(column.units(metric))),
                ""
                if base is None or column is base
                else show_difference(difference(base, column, metric, seed)),
            ]
            for column in arms
        ]
        if any(column.units(metric) for column in arms):
            sections[marked(_spelt(metric), METRICS[metric])] = rows
    return sectioned(["arm", "mean", "n", f"Δ to {_BASE}"], sections)


def _learned(arms: Sequence[Column]) -> list[str]:
    """What sessions were taught, and how often it was they that answered; nothing without any."""
    rows = []
    for column in arms:
        learning = _learning(column.only(record="lesson").records)
        if learning is None:
            continue
        answered = column.only(record="target").answered_by()
        rows.append([
            column.title,
            f"{answered.get('session', 0)} of {sum(answered.values())}" if answered else "–",
            f"{learning['learned_tokens']:,}",
            f"{learning['update_rate']:.0%}",
            f"{learning['nominal']:.2f}",
            f"{learning['seconds']:.1f}",
        ])  # fmt: skip
    if not rows:
        return []
    heads = ["arm", "answered by session", "learned tokens", "update rate", "cost", "learning s"]
    return [
        "Sessions (cost: nominal, per chunk, × forward; what a session did not answer, the base "
        "model did):",
        markdown(heads, rows),
    ]


def _followers(arms: Collection[str]) -> list[str]:
    """What must be known of arms that follow another, where there are any."""
    if not any("=" in name for name in arms):
        return []
    return [
        wrapped(
            "`random` and `fixed` get what the arm in parentheses has spent; compare their update "
            "rates: `random` loses draws that its budget refuses, and `fixed` updates the first "
            "chunks of a lesson rather than every so many. `=rate` follows the share of chunks "
            "updated, with UPDATE_1 alone; `=time` the measured cost."
        )
    ]


def _not_taught(header: Header) -> str:
    dropped = header.settings.get("dropped", {})
    counts = [f"{len(dropped.get(name, ()))} of {name}" for name in header.settings["repositories"]]
    return (
        "Files left out of what is taught, since they hold hidden text or are nearly copies of a "
        f"file with targets: {', '.join(counts)}."
    )


def _by(arms: Sequence[Column], name: str, values: Sequence[str]) -> str:
    """The main metrics of every arm, in a block for each value of a field of the records."""
    sections = {
        value: [
            [column.title, *(show(part.mean(metric), metric) for metric in _MAIN)]
            for column in arms
            for part in [column.only(**{name: value})]
        ]
        for value in values
    }
    return sectioned([f"by {name}", *map(_spelt, _MAIN)], sections)


def _spelt(metric: str) -> str:
    return metric.replace("_", " ")
