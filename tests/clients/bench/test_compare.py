"""`ponderttt bench compare`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from clients.bench.compare import compare
from clients.bench.repo_report import KEY_FIELDS, METRICS
from clients.results import Header, ResultFile
from ponderttt.errors import InvalidRequestError, PonderError

HEADER = Header(
    kind="humaneval",
    seed=0,
    model="tiny",
    base_url="http://here",
    server_version="0.1.0",
    settings={"gate": "off", "max_tokens": 400},
    key_fields=("task", "sample"),
    metrics={"passed": "higher", "seconds": "lower"},
)


@pytest.fixture
def app() -> typer.Typer:
    """The command alone."""
    command = typer.Typer()
    command.command()(compare)
    return command


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a result file with `passed` by task."""

    def make(name: str, passed: Mapping[str, list[bool]], **changes: Any) -> Path:
        path = tmp_path / f"{name}.jsonl"
        with ResultFile.open(path, replace(HEADER, **changes)) as results:
            for task, samples in passed.items():
                for sample, value in enumerate(samples):
                    results.append(
                        {"task": task, "sample": sample, "passed": value, "seconds": 1.0}
                    )
        return path

    return make


def run(app: typer.Typer, *arguments: object) -> Any:
    """Its outcome."""
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_compare_pairs_units_that_both_have(
    app: typer.Typer, write: Callable[..., Path], tmp_path: Path
) -> None:
    first = write("off", {"a": [True], "b": [False], "c": [False], "d": [True]})
    # Half of the samples of b pass; d is missing, e is new.
    second = write(
        "policy",
        {"a": [True, True], "b": [True, False], "c": [True, True], "e": [True, True]},
        settings={"gate": "policy", "max_tokens": 400},
        server_version="0.2.0",
    )
    out = tmp_path / "c.json"
    result = run(app, first, second, "--json", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    cell = found["columns"]["policy"]["passed"]
    assert (cell["mean"], cell["units"]) == (pytest.approx(3.5 / 4), 4)
    assert cell["difference"]["units"] == 3
    assert cell["difference"]["estimate"] == pytest.approx((0 + 0.5 + 1) / 3)
    assert found["differing"] == {
        "server_version": {"off": "0.1.0", "policy": "0.2.0"},
        "settings.gate": {"off": "off", "policy": "policy"},
    }
    shown = " ".join(result.output.split())
    # Over a, b and c, the first's mean is not the 0.5 of all four.
    assert "| policy | 0.875 | 4 | 0.333, 0.833 | +0.500 [-0.742, +1.742; t] | 3 |" in shown
    assert "settings.max_tokens" not in result.output


def test_compare_is_the_other_way_round_with_another_base(
    app: typer.Typer, write: Callable[..., Path], tmp_path: Path
) -> None:
    files = [
        write("one", {"a": [True], "b": [False], "c": [False]}),
        write("two", {"a": [True], "b": [True], "c": [False]}),
    ]
    found = []
    for base in ("one", "two"):
        out = tmp_path / f"{base}.json"
        assert run(app, *files, "--base", base, "--json", out).exit_code == 0
        found.append(json.loads(out.read_text())["columns"])
    there = found[0]["two"]["passed"]["difference"]
    back = found[1]["one"]["passed"]["difference"]
    assert there["estimate"] == pytest.approx(-back["estimate"])
    assert found[0]["one"]["passed"]["difference"] is None


def test_arms_of_a_file_have_columns_of_their_own(
    app: typer.Typer, write: Callable[..., Path], tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"kind": "repo", "key_fields": ("arm", "unit")}
    paths = []
    for name in ("x", "y"):
        path = tmp_path / f"{name}.jsonl"
        paths.append(path)
        with ResultFile.open(path, replace(HEADER, **fields)) as results:
            for arm, value in (("off", 0.0), ("policy@2", 1.0)):
                for unit in range(3):
                    results.append({"arm": arm, "unit": unit, "passed": value, "file": "f"})
                results.append({"arm": arm, "unit": "lesson 0"})
    result = run(app, *paths, "--metric", "passed")
    assert result.exit_code == 0, result.output
    titles = [line.split("|")[1].strip() for line in result.output.splitlines() if "|" in line]
    assert titles[-4:] == ["x off", "x policy@2", "y off", "y policy@2"]
    assert "All settings are the same." in result.output
    assert "seconds" not in result.output


def test_different_benchmarks_are_refused(app: typer.Typer, write: Callable[..., Path]) -> None:
    files = [write("one", {"a": [True]}), write("two", {"a": [True]}, kind="mbpp")]
    error = run(app, *files).exception
    assert isinstance(error, InvalidRequestError)
    assert "one.jsonl is of humaneval, two.jsonl is of mbpp" in str(error)


def test_files_without_a_common_unit_show_no_difference(
    app: typer.Typer, write: Callable[..., Path]
) -> None:
    result = run(app, write("one", {"a": [True]}), write("two", {"b": [True]}))
    assert result.exit_code == 0, result.output
    assert "no unit in common" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ONE"], "name two"),
        (["ONE", "ONE"], "named twice"),
        (["ONE", "none.jsonl"], "doesn't exist"),
        (["ONE", "TWO", "--metric", "beauty"], "no 'beauty'; give passed, seconds"),
        (["ONE", "TWO", "--base", "three"], "give one of one, two"),
        (["ONE", "TWO", "--json", "/nowhere/x"], "--json: /nowhere is no directory to write to"),
        (["ONE", "OTHER"], "no result file"),
    ],
)
def test_bad_input_is_named(
    app: typer.Typer,
    write: Callable[..., Path],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("hello\n")
    places = {
        "ONE": write("one", {"a": [True]}),
        "TWO": write("two", {"a": [True]}),
        "OTHER": other,
    }
    error = run(app, *[places.get(each, each) for each in arguments]).exception
    assert isinstance(error, PonderError)
    assert message in str(error)


def load_file(path: Path, records: list[dict[str, Any]]) -> Path:
    """A result file of a load; the fields that don't matter here are filled in."""
    header = replace(
        HEADER,
        kind="load",
        settings={"load": path.stem},
        key_fields=("request",),
        metrics={"ok": "higher", "ttft": "lower", "seconds": "lower"},
    )
    rest = {"warmup": False, "tpot": 0.1, "gap": 0.0, "lag": 0.0, "error": None,
            "prompt_tokens": 4, "completion_tokens": 10}  # fmt: skip
    with ResultFile.open(path, header) as results:
        for number, record in enumerate(records):
            ok = record.get("outcome", "ok") == "ok"
            results.append(
                rest
                | {"request": f"0/{number}", "due": float(number), "outcome": "ok", "ok": ok}
                | {"ttft": record["seconds"] / 2 if ok else None}
                | record
            )
    return path


def test_load_that_is_rejected_is_no_quick_load(app: typer.Typer, tmp_path: Path) -> None:
    warmup: dict[str, Any] = {"warmup": True, "seconds": 50.0}
    served = [warmup, *({"seconds": 2.0, "elapsed": 2.0} for _ in range(4))]
    # As earlier versions wrote them: rejected at once, `seconds` all the same.
    rejected: dict[str, Any] = {
        "outcome": "rejected",
        "seconds": 0.01,
        "completion_tokens": 0,
        "error": "429",
    }
    refusing = [warmup, {"seconds": 3.0}, rejected, rejected, rejected]
    files = [load_file(tmp_path / "a.jsonl", served), load_file(tmp_path / "b.jsonl", refusing)]
    out = tmp_path / "c.json"
    result = run(app, *files, "--json", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    a, b = found["columns"]["a"], found["columns"]["b"]
    assert (a["seconds"]["mean"], a["seconds"]["units"]) == (2.0, 4)
    assert (b["seconds"]["mean"], b["seconds"]["units"]) == (3.0, 1)
    assert b["seconds"]["difference"]["estimate"] == 1.0
    assert (b["ok"]["mean"], b["ok"]["units"]) == (0.25, 4)
    # From 1 s to 6 s; from 1 s to 4 s.
    assert found["load"]["a"]["answers_per_second"] == pytest.approx(4 / 5)
    assert found["load"]["b"]["answers_per_second"] == pytest.approx(1 / 3)
    assert found["load"]["b"]["goodput"]["share"] == 0.25
    for row in (
        "| load | a | b |",
        "| requests | 4 | 4 |",
        "| ok / rejected / timed out / failed | 4 / 0 / 0 / 0 | 1 / 3 / 0 / 0 |",
        "| output tokens per second | 8.000 | 3.333 |",
        "| seconds, p50 / p90 / p99 | 2.000 / 2.000 / 2.000 | 3.000 / 3.000 / 3.000 |",
        "| goodput per second (of requests) | 0.800 (100.0%) | 0.333 (25.0%) |",
    ):
        assert row in " ".join(result.output.split())


def test_repositories_are_compared_by_their_targets(app: typer.Typer, tmp_path: Path) -> None:
    files = []
    for name, better in (("one", 0.0), ("two", 0.5)):
        header = replace(HEADER, kind="repo", key_fields=KEY_FIELDS, metrics=METRICS)
        files.append(tmp_path / f"{name}.jsonl")
        with ResultFile.open(files[-1], header) as results:
            for arm, gain in (("off", 0.0), ("adapt@2", better)):
                shared = {"repository": "r", "arm": arm}
                results.append(
                    shared | {"unit": "lesson 0", "record": "lesson", "version": 3, "updates": 3}
                )
                results.append(
                    shared
                    | {"unit": "retaught 0", "record": "retaught", "version": 3, "updates": 3}
                )
                for file in ("x", "y"):
                    results.append(
                        shared
                        | {"unit": f"{file}:1", "record": "target", "file": file, "exact": True,
                           "loss": 2.0 - gain}
                    )  # fmt: skip
                results.append(
                    shared | {"unit": "unrelated u", "record": "unrelated", "unrelated_loss": 1.0}
                )
    out = tmp_path / "c.json"
    result = run(app, *files, "--json", out, "--metric", "loss", "--metric", "unrelated_loss")
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())["columns"]
    assert list(found) == ["one off", "one adapt@2", "two off", "two adapt@2"]
    assert found["two adapt@2"]["loss"]["units"] == 2
    assert found["two adapt@2"]["loss"]["difference"]["estimate"] == pytest.approx(-0.5)
    assert found["two adapt@2"]["unrelated_loss"]["units"] == 1
