"""What the HumanEval exam of the repository benchmark shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from clients.bench.repo_exam import Exam
from tests.clients.bench.comparing import answers, write


def test_table_tells_who_answered(tmp_path: Path) -> None:
    exam = Exam("http://test", None, None, cast("Any", None), 4, tmp_path / "r.jsonl", 1.0, 0, True)
    sessions = {"off": None, "project-adapt@2": "abcd"}
    for title, digest in sessions.items():
        ttt = {"choice": {"read": "base"}} if digest is not None else None
        write(exam.path(title), answers([True] * 4, ttt=ttt), problems=4, session_digest=digest)
        assert not exam.is_due(title, digest)
    shown = " ".join(exam.table().split())
    assert (
        "answered by the session** | | | | | | | r-humaneval-project-adapt@2 | 0.0% | 4 |" in shown
    )
    assert "unfinished" not in shown
