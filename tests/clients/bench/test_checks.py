"""Result files that don't belong together, are damaged or not finished."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clients.bench.checks import unfinished
from clients.results import Better, Header, Record, read_results
from ponderttt.errors import InvalidRequestError, PonderError
from tests.clients.bench.comparing import (
    HEADER,
    REPO,
    answers,
    found,
    outcome,
    repository,
    shown,
    write,
)

LOAD = Header(
    kind="load", seed=0, model="tiny", base_url="http://here", server_version=None,
    settings={"requests": 2, "duration": None, "warmup": 1}, key_fields=("request",),
    metrics={"ok": "higher", "seconds": "lower"},
)  # fmt: skip
#: Of one repository and one arm, with two targets and nothing else.
STEPS = replace(
    REPO,
    settings={
        "repositories": ["r"], "arms": ["off"], "files": 2, "targets": 2, "unrelated": [],
        "steps": 2,
    },
)  # fmt: skip
RETAUGHT: Record = {"repository": "r", "arm": "off", "unit": "retaught 0", "record": "retaught"}
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
    for part in (f"{name}: {files[0]} aaaa, {files[1]} bbbb", remedy, "--unpaired"):
        assert part in str(error)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"texts": "bbbb"}, "texts: {0} aaaa, {1} bbbb"),
        ({"prompt_tokens": "8"}, "prompt_tokens: {0} 4, {1} 8"),
        ({"output_tokens": "uniform:1:8"}, "output_tokens: {0} 8, {1} uniform:1:8"),
        ({"reuse": 0.5}, "reuse: {0} 0.0, {1} 0.5"),
        ({"chars_per_token": 3.5}, "chars_per_token: {0} 4.0, {1} 3.5"),
        # What is drawn for it is not drawn for the prompt.
        ({"think": "uniform:1:2"}, "think: {0} constant, {1} uniform"),
    ],
)
def test_loads_of_other_prompts_are_refused(
    tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    drawn = {"texts": "aaaa", "prompt_tokens": "4", "output_tokens": "8", "reuse": 0.0,
             "chars_per_token": 4.0, "think": "0"}  # fmt: skip
    files = [
        write(tmp_path / f"{name}.jsonl", [REQUEST], LOAD, **drawn | settings)
        for name, settings in (("a", {}), ("b", changed), ("c", {"think": "2", "rate": 5.0}))
    ]
    error = outcome(*files[:2]).exception
    assert isinstance(error, InvalidRequestError)
    assert told.format(*files) in str(error)
    assert "the same --texts, --prompt-tokens" in str(error)
    assert "| 1.000, 1.000 | +0.000 [–] | 1 |" in shown(files[0], files[2])
    other = write(tmp_path / "d.jsonl", [REQUEST], replace(LOAD, seed=1), **drawn)
    assert f"seed: {files[0]} 0, {other} 1" in str(outcome(files[0], other).exception)


#: Of the version that knows parts.
PARTS = {"repository_texts": {"r": "rr", "s": "ss"}, "unrelated_texts": "uu"}
BOTH = [*repository("r", "off", 2), *repository("s", "off", 2)]


@pytest.mark.parametrize(
    ("settings", "paired", "out"),
    [
        # Without loss nothing is read; of a smaller context less.
        ({"unrelated_texts": None}, {"exact": 4, "unrelated_loss": 0}, "the unrelated code"),
        ({"unrelated_texts": "cut"}, {"exact": 4, "unrelated_loss": 0}, "the unrelated code"),
        (
            {"repository_texts": {"r": "rr", "s": "changed"}},
            {"exact": 2, "unrelated_loss": 2},
            "repository s",
        ),
        ({"repository_texts": {"r": "rr"}}, {"exact": 2, "unrelated_loss": 2}, "repository s"),
    ],
)
def test_repositories_are_paired_where_they_are_the_same(
    tmp_path: Path, settings: dict[str, Any], paired: dict[str, int], out: str
) -> None:
    metrics: dict[str, Better] = {"exact": "higher", "unrelated_loss": "lower"}
    header = replace(REPO, metrics=metrics)
    files = [
        write(tmp_path / "a.jsonl", BOTH, header, arms=["off"], **PARTS),
        write(tmp_path / "b.jsonl", BOTH, header, arms=["off"], **PARTS | settings, texts="bbbb"),
    ]
    text = shown(*files)
    assert f"since only one has it or theirs differ: {out}." in text
    assert "WARNING" not in text
    result = found(*files, out=tmp_path / "c.json")
    cells = result["columns"]["b off"]
    units = {name: (cells[name]["difference"] or {"units": 0})["units"] for name in paired}
    assert units == paired
    assert list(result["differing"]) == ["settings.texts"]


@pytest.mark.parametrize(
    ("here", "there"),
    [
        # Of the version before.
        ({}, {}),
        (PARTS, {}),
        (PARTS, {"repository_texts": {"r": "x", "s": "y"}, "unrelated_texts": "z"}),
        # Unrelated code is read in sessions of repositories.
        (PARTS, {"repository_texts": {"t": "rr"}, "unrelated_texts": "uu"}),
    ],
)
def test_repositories_of_which_nothing_is_the_same_are_refused(
    tmp_path: Path, here: dict[str, Any], there: dict[str, Any]
) -> None:
    files = [
        write(tmp_path / "a.jsonl", BOTH, REPO, **here),
        write(tmp_path / "b.jsonl", BOTH, REPO, **there, texts="bbbb"),
    ]
    assert f"texts: {files[0]} aaaa, {files[1]} bbbb" in str(outcome(*files).exception)
    assert "no unit in common" in shown(*files, "--unpaired")


def test_files_of_the_version_before_are_paired_by_all_their_texts(tmp_path: Path) -> None:
    old = write(tmp_path / "old.jsonl", BOTH, REPO, arms=["off"])
    new = write(tmp_path / "new.jsonl", BOTH, REPO, arms=["off"], steps=6, **PARTS)
    assert "All settings are the same." in shown(old, new)
    assert "Left out" not in shown(old, new)


def test_problems_that_are_the_same_are_paired_in_other_parts_of_a_suite(tmp_path: Path) -> None:
    def part(name: str, hashes: list[str], *, known: bool = True) -> Path:
        records = answers([True] * len(hashes))
        for record, value in zip(records, hashes, strict=True):
            record |= {"problem_hash": value} if known else {}
        return write(tmp_path / f"{name}.jsonl", records, problems_hash=name, problems=len(hashes))

    first = part("first", ["a", "b", "c"])
    # Base prompts show more, of the same problems.
    base = part("base", ["a1", "b1", "c1", "d1"])
    changed = part("changed", ["a2", "x2"])
    text = shown(first, base, changed)
    assert "| base | 1.000 | 4 | 1.000, 1.000 | +0.000 [–] | 3 |" in text
    assert "| changed | 1.000 | 2 | 1.000, 1.000 | +0.000 [–] | 1 |" in text
    assert "theirs differ: problem 3." in text
    assert "theirs differ: problem 1, problem 2." in text
    assert f"problems_hash: {base} base, {changed} changed" in str(outcome(base, changed).exception)
    old = part("old", ["a"], known=False)
    assert isinstance(outcome(first, old).exception, InvalidRequestError)
    # The base is asked about, not the others among themselves.
    assert outcome(base, changed, first, "--base", "first").exit_code == 0


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
    assert "So nothing of `other` is paired with `first`" in text
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
        # One arm alone, without loss: nothing else shows that targets are missing.
        (STEPS, repository("r", "off", 1), "1 of 2 steps"),
        (STEPS, [*repository("r", "off", 1), RETAUGHT], "1 of 2 steps"),
        (STEPS, repository("r", "off", 2)[:2], None),
    ],
)  # fmt: skip
def test_unfinished_file_says_how_far_it_came(
    tmp_path: Path, header: Header, records: list[Record], told: str | None
) -> None:
    said = unfinished(*read_results(write(tmp_path / "a.jsonl", records, header)))
    assert (said is None) == (told is None)
    assert (said or "").removeprefix("unfinished: ").startswith(told or "")


@pytest.mark.parametrize("kind", ["humaneval", "repo", "load"])
def test_file_that_does_not_say_what_was_planned_is_not_called_unfinished(kind: str) -> None:
    assert unfinished(replace(HEADER, kind=kind, settings={"problems": 12}), []) is None
