"""Writing small result files, and comparing them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from clients.bench.compare import compare
from clients.results import Header, Record, ResultFile

HEADER = Header(
    kind="humaneval",
    seed=0,
    model="tiny",
    base_url="http://here",
    server_version="0.1.0",
    settings={"problems": 12, "samples": 1, "problems_hash": "aaaa"},
    key_fields=("task_id", "sample"),
    metrics={"passed": "higher", "seconds": "lower"},
)
#: Of the repository benchmark: two repositories, two arms, at most two targets each.
REPO = replace(
    HEADER,
    kind="repo",
    settings={
        "repositories": ["r", "s"], "arms": ["off", "adapt@2"], "files": 1, "targets": 2,
        "unrelated": ["u"], "texts": "aaaa",
    },
    key_fields=("repository", "arm", "unit"),
    metrics={"exact": "higher", "loss": "lower"},
)  # fmt: skip


def write(
    path: Path, records: Sequence[Record], header: Header = HEADER, /, **settings: Any
) -> Path:
    """A result file; settings are added to the header's."""
    whole = replace(header, settings={**header.settings, **settings})
    with ResultFile.open(path, whole) as results:
        for record in records:
            results.append(record)
    return path


def answers(passed: Sequence[bool], sample: int = 0, **fields: Any) -> list[Record]:
    """A record for each problem, which took as many seconds as its number."""
    return [
        {"task_id": str(n), "sample": sample, "passed": value, "seconds": float(n)} | fields
        for n, value in enumerate(passed)
    ]


def repository(name: str, arm: str, targets: int, **fields: Any) -> list[Record]:
    """Targets of an arm, and the unrelated file where there are two."""
    shared = {"repository": name, "arm": arm}
    records: list[Record] = [
        shared
        | {"unit": f"f:{n}", "record": "target", "file": "f", "kind": "line", "exact": True,
           "loss": 1.0}
        | fields
        for n in range(targets)
    ]  # fmt: skip
    unrelated = {"unit": "unrelated u", "record": "unrelated", "unrelated_loss": 1.0}
    return records + ([shared | unrelated] if targets == 2 else [])


def outcome(*arguments: object) -> Any:
    """Of the command."""
    app = typer.Typer()
    app.command()(compare)
    return CliRunner().invoke(app, [str(each) for each in arguments])


def shown(*arguments: object) -> str:
    """What the command prints, each stretch of white space as one blank."""
    result = outcome(*arguments)
    assert result.exit_code == 0, result.exception
    return " ".join(result.output.split())


def found(*arguments: object, out: Path) -> Any:
    """What the command writes for --json."""
    shown(*arguments, "--json", out)
    return json.loads(out.read_text())
