"""Result files that don't belong together, are damaged or not finished."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from clients.bench.checks import unfinished
from clients.results import Header, Record, read_results
from ponderttt.errors import InvalidRequestError, PonderError
from tests.clients.bench.comparing import HEADER, REPO, answers, outcome, repository, shown, write

LOAD = Header(
    kind="load", seed=0, model="tiny", base_url="http://here", server_version=None,
    settings={"requests": 2, "duration": None, "warmup": 1}, key_fields=("request",),
    metrics={"ok": "higher", "seconds": "lower"},
)  # fmt: skip
REQUEST: Record = {
    "request": "0/0", "warmup": False, "due": 0.0, "outcome": "ok", "ok": True, "error": None,
    "ttft": 0.1, "tpot": 0.1, "seconds": 1.0, "gap": 0.0, "lag": 0.0, "prompt_tokens": 4,
    "completion_tokens": 10,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name", "remedy"),
    [
        ("humaneval", "problems_hash", "the same --data, --limit and --problems"),
        ("repo", "texts", "the same files, sizes and --seed"),
        ("load", "texts", "the same --texts"),
    ],
)
def test_files_with_other_data_are_refused_with_both_hashes(
    tmp_path: Path, kind: str, name: str, remedy: str
) -> None:
    files = []
    for data in ("aaaa", "bbbb"):
        header = replace(HEADER, kind=kind, settings={name: data})
        files.append(write(tmp_path / f"{data}.jsonl", answers([True]), header))
    error = outcome(*files).exception
    assert isinstance(error, InvalidRequestError)
    for part in (f"{files[0]} aaaa", f"{files[1]} bbbb", remedy, "--unpaired"):
        assert part in str(error)


def test_files_with_other_data_are_shown_unpaired_below_a_warning(tmp_path: Path) -> None:
    first, same, other = (
        write(tmp_path / f"{name}.jsonl", answers(passed), problems_hash=data)
        for name, passed, data in (
            ("first", [True, False], "aaaa"),
            ("same", [True, True], "aaaa"),
            ("other", [True, True], "bbbb"),
        )
    )
    text = shown(first, same, other, "--unpaired")
    assert text.startswith("**WARNING: these files were asked other things**")
    assert "`first` aaaa, `same` aaaa, `other` bbbb" in text
    assert "| same | 1.000 | 2 | 0.500, 1.000 | +0.500" in text
    assert "| other | 1.000 | 2 | | no unit in common | |" in text


@pytest.mark.parametrize(
    ("header", "record", "fault"),
    [
        (HEADER, answers([True])[0] | {"seconds": "fast"}, "seconds is 'fast'"),
        (HEADER, answers([True])[0] | {"seconds": [1.0]}, "seconds is [1.0]"),
        (HEADER, answers([True])[0] | {"passed": 0.5}, "passed is 0.5, not true or false"),
        (HEADER, {"sample": 0, "passed": True}, "task_id is missing"),
        (REPO, repository("r", "off", 1)[0] | {"loss": {}}, "loss is {}"),
        (REPO, repository("r", "off", 1)[0] | {"file": ["f"]}, "file is ['f']"),
        (LOAD, REQUEST | {"ttft": "soon"}, "ttft is 'soon'"),
        (LOAD, REQUEST | {"seconds": None}, "seconds is None"),
        (LOAD, REQUEST | {"outcome": 5}, "outcome is 5"),
        (LOAD, {"request": "0/0"}, "outcome is missing"),
    ],
)
def test_record_that_cannot_be_compared_is_named_by_file_and_line(
    tmp_path: Path, header: Header, record: Record, fault: str
) -> None:
    good = {"humaneval": answers([True])[0], "repo": repository("r", "off", 1)[0], "load": REQUEST}
    whole = write(tmp_path / "whole.jsonl", [good[header.kind]], header)
    damaged = tmp_path / "damaged.jsonl"
    lines = [*whole.read_text().splitlines(), json.dumps(record)]
    damaged.write_text("\n".join(lines) + "\n")
    error = outcome(whole, damaged).exception
    assert isinstance(error, PonderError)
    assert f"{damaged} is damaged, line 3: " in str(error)
    assert fault in str(error)


@pytest.mark.parametrize(
    ("header", "records", "told"),
    [
        (HEADER, answers([True] * 5), "5 of 12 answers"),
        (HEADER, [], "0 of 12 answers"),
        (HEADER, answers([True] * 12), None),
        (LOAD, [REQUEST], "1 of 3 requests"),
        (LOAD, [REQUEST] * 3, None),
        (REPO, [], "0 of at most 12 targets and unrelated files"),
        (REPO, [*repository("r", "off", 2), *repository("r", "adapt@2", 1)], "4 of at most 12"),
        (
            REPO,
            # One of the targets that were asked for wasn't there to be drawn: that is no gap.
            [r for arm in ("off", "adapt@2") for n in "rs" for r in repository(n, arm, 2)
             if (n, r["unit"]) != ("s", "f:1")],
            None,
        ),
        (
            REPO,
            [r for arm in ("off", "adapt@2") for n in "rs" for r in repository(n, arm, 2)][:-1],
            "11 of at most 12",
        ),
    ],
)  # fmt: skip
def test_unfinished_file_says_how_far_it_came(
    tmp_path: Path, header: Header, records: list[Record], told: str | None
) -> None:
    found = unfinished(*read_results(write(tmp_path / "a.jsonl", records, header)))
    assert (found is None) == (told is None)
    assert (found or "").removeprefix("unfinished: ").startswith(told or "")


@pytest.mark.parametrize("kind", ["humaneval", "repo", "load"])
def test_file_that_does_not_say_what_was_planned_is_not_called_unfinished(kind: str) -> None:
    assert unfinished(replace(HEADER, kind=kind, settings={"problems": 12}), []) is None
