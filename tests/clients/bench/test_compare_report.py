"""What `ponderttt bench compare` shows of unequal files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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


def test_unfinished_file_says_so_and_is_compared_over_common_units(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.jsonl", answers([True] * 12))
    part = write(tmp_path / "part.jsonl", answers([True] * 5))
    text = shown(whole, part)
    assert "`part`: unfinished: 5 of 12 answers." in text
    assert "`whole`: unfinished" not in text
    # Seconds are 0 to 11, and 0 to 4.
    assert "| whole | 5.500 | 12 | | (base) | |" in text
    assert "| part | 2.000 | 5 | 2.000, 2.000 | +0.000 [–] | 5 |" in text
    assert "both over the units that both have (`common n`)" in text
    cell = found(whole, part, out=tmp_path / "c.json")["columns"]["part"]["seconds"]
    assert (cell["mean"], cell["base_mean"], cell["own_mean"]) == (2.0, 2.0, 2.0)


def test_file_without_a_record_keeps_its_column(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.jsonl", [])
    some = write(tmp_path / "some.jsonl", answers([True] * 12))
    other = write(tmp_path / "other.jsonl", answers([False] * 12))
    text = shown(empty, some, other)
    assert "`empty`: unfinished: 0 of 12 answers." in text
    assert "| empty | – | 0 | | | |" in text
    # Nothing is known of it: the others are compared with the first that has a result.
    assert "| some | 1.000 | 12 | | (base) | |" in text
    assert "none of them has a result yet" in str(outcome(empty, _copy(empty)).exception)


def _copy(path: Path) -> Path:
    copy = path.with_name("copy.jsonl")
    copy.write_bytes(path.read_bytes())
    return copy


def test_arm_that_has_not_begun_keeps_its_column(tmp_path: Path) -> None:
    whole = [r for arm in ("off", "adapt@2") for n in "rs" for r in repository(n, arm, 2)]
    files = [
        write(tmp_path / "whole.jsonl", whole, REPO),
        write(tmp_path / "part.jsonl", whole[:3], REPO),
    ]
    result = found(*files, out=tmp_path / "c.json")
    assert list(result["columns"]) == ["whole off", "whole adapt@2", "part off", "part adapt@2"]
    assert result["columns"]["part adapt@2"]["exact"]["units"] == 0
    assert result["unfinished"] == {
        "part": "unfinished: 3 of at most 12 targets and unrelated files"
    }


def samples(passed: list[int], count: int) -> list[dict[str, Any]]:
    """So many samples of each problem, of which the first ones pass."""
    return [r for n in range(count) for r in answers([n < each for each in passed], sample=n)]


def test_pass_at_k_is_compared_where_both_have_the_samples(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", samples([1, 0, 5], 5), samples=5)
    two = write(tmp_path / "two.jsonl", samples([2, 0, 9], 12), samples=12)
    result = found(one, two, out=tmp_path / "c.json")
    assert [name for name in result["better"] if "pass" in name] == ["passed", "pass@5"]
    # 1 - C(10, 5) / C(12, 5)
    assert result["columns"]["one"]["pass@5"]["mean"] == pytest.approx((1 + 0 + 1) / 3)
    cell = result["columns"]["two"]["pass@5"]
    assert cell["mean"] == pytest.approx((1 - 252 / 792 + 0 + 1) / 3)
    assert cell["difference"]["estimate"] == pytest.approx(-252 / 792 / 3)
    text = shown(one, two, "--metric", "pass@2", "--metric", "pass@10")
    assert "| one | – | 0 | | (base) | |" in text
    # 1 - C(4, 2) / C(5, 2)
    assert f"| one | {(0.4 + 0 + 1) / 3:.3f} | 3 |" in text
    error = outcome(one, two, "--metric", "pass@13").exception
    assert "no 'pass@13'; give passed, seconds, pass@k with k up to 12" in str(error)


def test_problem_with_too_few_samples_has_no_pass_at_k(tmp_path: Path) -> None:
    whole = samples([1, 1, 1], 10)
    one = write(tmp_path / "one.jsonl", whole, samples=10)
    two = write(tmp_path / "two.jsonl", whole[:-2], samples=10)
    cell = found(one, two, out=tmp_path / "c.json")["columns"]["two"]["pass@10"]
    assert (cell["units"], cell["difference"]["units"]) == (1, 1)


def test_share_that_the_session_answered_is_told(tmp_path: Path) -> None:
    reports: list[Any] = [{"choice": {"read": read}} for read in ("session", "base", "base")]
    # Of other servers, of earlier versions, and of none.
    reports += [{"choice": None}, {}, None]
    told = [answers([True] * (n + 1), ttt=ttt)[n] for n, ttt in enumerate(reports)]
    off = write(tmp_path / "off.jsonl", answers([True] * 12, ttt=None))
    auto = write(tmp_path / "auto.jsonl", told)
    text = shown(off, auto)
    assert "| **answered by the session** | | | | | | | auto | 33.3% | 3 | | | |" in text
    assert "the others are the base model's" in text
    assert found(off, auto, out=tmp_path / "c.json")["answered_by"] == {
        "auto": {"session": 1, "base": 2}
    }


def test_share_that_sessions_answered_in_repositories_is_told(tmp_path: Path) -> None:
    records = [*repository("r", "off", 2), *repository("r", "adapt@2", 2, answered_by="base")]
    files = [write(tmp_path / f"{name}.jsonl", records, REPO) for name in ("a", "b")]
    text = shown(*files)
    assert "| **answered by the session** | | | | | | | a adapt@2 | 0.0% | 2 | | | |" in text


def test_comparison_of_many_arms_fits_a_terminal(tmp_path: Path) -> None:
    arms = ["off", "stuffed", *(f"{kind}=rate(adapt@1.5)" for kind in ("random", "fixed"))]
    files = []
    for name in ("one", "two"):
        files.append(tmp_path / f"{name}.jsonl")
        records = [
            record
            for arm in arms
            for repo in "rs"
            for record in repository(repo, arm, 2, exact=name == "two", loss=float(len(arm)))
        ]
        # What was left out of the lessons is a long list.
        dropped = {repo: [f"{name}/{repo}/module{n}.py" for n in range(20)] for repo in "rs"}
        write(files[-1], records, REPO, arms=arms, dropped=dropped)
    lines = outcome(*files).output.splitlines()
    assert max(map(len, lines)) <= 120
    # All rows of a table end below each other.
    assert len({len(line) for line in lines if line.startswith("|")}) == 1


def test_metric_that_no_file_has_takes_no_rows(tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"{name}.jsonl", answers([True], seconds=None)) for name in ("a", "b")
    ]
    text = shown(*files)
    assert "seconds (↓)" not in text
    assert "No file has seconds." in text
    assert HEADER.metrics["seconds"] == "lower"
