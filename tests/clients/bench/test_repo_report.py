"""The table of the repository benchmark."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from clients.bench.repo_report import METRICS, record_check, summary, table
from clients.results import Header, Record, read_results
from tests.clients.bench.comparing import REPO, repository, write

ARMS = [
    "off", "stuffed", "adapt@1.5", "random=rate(adapt@1.5)", "random=time(adapt@1.5)",
    "fixed=rate(adapt@1.5)", "fixed=time(adapt@1.5)",
]  # fmt: skip
LESSON = {
    "unit": "lesson 0", "record": "lesson", "chunks": 4, "updates": 2, "tokens": 900,
    "learned_tokens": 512, "nominal": 1.5, "measured": 1.2, "adapt_seconds": 3.0,
}  # fmt: skip


def results(path: Path) -> tuple[Header, list[Record]]:
    """Of seven arms on two repositories."""
    records: list[Record] = []
    for name in ("huggingface_hub", "schemathesis"):
        for arm in ARMS:
            learns = "adapt" in arm
            if learns:
                records.append({"repository": name, "arm": arm} | LESSON)
            fields = {
                "completion": "x",
                "edit_similarity": 0.25,
                "identifier_f1": 0.5,
                "prompt_tokens": 3879.0,
            }
            fields |= {"loss": 1.0 + len(arm) / 7, "answer_loss": 1.0}
            read = {"answered_by": "session"} if learns else {}
            records += repository(name, arm, 2, **fields, **read)
    header = replace(REPO, metrics=METRICS)
    repositories = ["huggingface_hub", "schemathesis"]
    return read_results(write(path, records, header, arms=ARMS, repositories=repositories))


def test_table_of_seven_arms_fits_a_terminal(tmp_path: Path) -> None:
    text = table(*results(tmp_path / "r.jsonl"))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    shown = " ".join(text.split())
    # A row for each arm in the block of each metric, and the difference beside the mean.
    block = shown.partition("**loss (↓)**")[2].partition("**")[0]
    assert all(f"| {arm} |" in block for arm in ARMS)
    assert "| fixed=time(adapt@1.5) | 4.000 | 4 | +2.571 [" in block
    assert "| off | 1.429 | 4 | |" in block
    assert "| adapt@1.5 | 4 of 4 | 1,024 | 50% | 1.50 | 6.0 |" in shown
    assert "| stuffed | 4 | 3,879 |" in shown


def test_table_has_blocks_by_repository_and_kind(tmp_path: Path) -> None:
    shown = " ".join(table(*results(tmp_path / "r.jsonl")).split())
    for title in ("line", "block", "call", "huggingface_hub", "schemathesis"):
        assert f"| **{title}** | | | | | off |" in shown


def test_metric_that_no_arm_has_takes_no_block(tmp_path: Path) -> None:
    header, records = results(tmp_path / "r.jsonl")
    kept = [{k: v for k, v in r.items() if "loss" not in k} for r in records]
    assert "loss (↓)" not in table(header, kept)


def test_summary_keeps_its_fields(tmp_path: Path) -> None:
    found = summary(*results(tmp_path / "r.jsonl"))
    arm = found["arms"]["adapt@1.5"]
    assert list(arm) == [
        "targets", "means", "differences", "learning", "answered_by", "by_kind", "by_repository",
    ]  # fmt: skip
    assert arm["answered_by"] == {"session": 4}
    assert found["arms"]["off"]["answered_by"] == {}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"answer": " \n"}, "are empty"),
        ({"answer": "\ndef other():"}, "came to nothing after cutting"),
        # Files of earlier versions don't say.
        ({}, "came to nothing after cutting"),
    ],
)
def test_kind_without_a_single_answer_is_told(tmp_path: Path, fields: Record, told: str) -> None:
    header, records = results(tmp_path / "r.jsonl")
    assert "**All" not in table(header, records)
    for record in records:
        if record["arm"] == "off" and record["record"] == "target":
            record |= {"kind": "block", "completion": "\n", **fields}
    shown = " ".join(table(header, records).split())
    assert f"**All 4 answers of kind block in arm off {told}**" in shown


@pytest.mark.parametrize(
    ("record", "wrong"),
    [
        ({"record": "target", "kind": "line", "file": "a"}, ".exact is missing"),
        ({"record": "lesson", "tokens": "x"}, ".tokens is 'x', not a whole number from 0 on"),
        ({"record": "else"}, ".record is 'else', not target, lesson, unrelated, retaught"),
    ],
)
def test_record_that_the_report_could_not_read_is_named(record: Record, wrong: str) -> None:
    found = record_check(record)
    assert found is not None
    assert " ".join(found) == wrong
