"""The HumanEval exam of the repository benchmark: what it asks again, and what it shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from clients.bench.repo_exam import Exam
from clients.results import Header, Record, ResultFile, read_results
from ponderttt.errors import InvalidRequestError
from tests.clients.bench.comparing import HEADER, answers, write

SESSION = "project-adapt@2"


class Server:
    """Stands for `humaneval_in_session`: asks what the file lacks, in a session of digest `abcd`.

    Attributes:
        version: of the server.
        settings: that it tells of itself.
        asked: how many problems, by session.
    """

    def __init__(self) -> None:
        self.version = "1"
        self.settings = {"server.rank": 16}
        self.asked: dict[str | None, int] = {}

    def __call__(
        self, base_url: str, session: str | None, output: Path, sandbox: object, **options: Any
    ) -> tuple[Header, list[Record]]:
        learned: dict[str, Any] = {"session": session, "session_digest": None, "fork": None}
        if session is not None:
            learned |= {"session_digest": "abcd", "fork": False}
            learned |= {"ttt.read": options["read"]} if options["read"] else {}
        settings = {"problems": options["limit"], "samples": 1, **learned, **self.settings}
        header = replace(
            HEADER, seed=options["seed"], model=options["model"], server_version=self.version,
            settings=settings,
        )  # fmt: skip
        with ResultFile.open(output, header, fresh=options["fresh"]) as results:
            left = answers([True] * options["limit"])[results.resumed :]
            self.asked[session] = len(left)
            for record in left:
                results.append(record)
            return results.header, results.records


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """What every exam asks."""
    made = Server()
    monkeypatch.setattr("clients.bench.repo_exam.humaneval_in_session", made)
    return made


def exam_at(path: Path, problems: int = 4, **changes: Any) -> Exam:
    """Beside `r.jsonl`."""
    made = Exam("http://test", None, "m", cast("Any", None), problems, path, 1.0, 0, True)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def take_both(exam: Exam, server: Server) -> dict[str | None, int]:
    """How many problems were asked without a session, and in one; None where it wasn't due."""
    server.asked.clear()
    exam.take("off", None)
    exam.take(SESSION, "s", "abcd")
    return dict(server.asked)


def test_finished_exam_is_asked_nothing_again(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    assert take_both(exam_at(path), server) == {None: 4, "s": 4}
    # Nor does it need its session.
    assert take_both(exam_at(path), server) == {None: 0}


@pytest.mark.parametrize(
    ("problems", "changes", "served"),
    [
        (3, {}, {}),
        (4, {"model": "other"}, {}),
        (4, {"seed": 7}, {}),
        (4, {}, {"version": "2"}),
        (4, {}, {"settings": {"server.rank": 8}}),
    ],
)
def test_exam_that_was_taken_otherwise_is_taken_anew(
    server: Server, tmp_path: Path, problems: int, changes: dict[str, Any], served: dict[str, Any]
) -> None:
    path = tmp_path / "r.jsonl"
    take_both(exam_at(path), server)
    for name, value in served.items():
        setattr(server, name, value)
    exam = exam_at(path, problems, **changes)
    assert take_both(exam, server) == {None: problems, "s": problems}
    found = exam.compared()
    assert found is not None
    cell = found["columns"][f"r-humaneval-{SESSION}"]["passed"]
    assert cell["difference"]["units"] == problems
    for title in ("off", SESSION):
        assert len(read_results(exam.path(title))[1]) == problems


def test_session_that_answers_otherwise_is_examined_anew(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    take_both(exam_at(path), server)
    exam = exam_at(path, read="session")
    assert take_both(exam, server) == {None: 0, "s": 4}


def test_exam_is_taken_anew_where_all_is(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    take_both(exam_at(path), server)
    exam = exam_at(path, fresh=True)
    assert exam.is_due(SESSION, "abcd")
    assert take_both(exam, server) == {None: 4, "s": 4}
    # Once.
    assert take_both(exam, server) == {}


def test_exam_goes_on_where_it_was_cut_off(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    exam = exam_at(path)
    take_both(exam, server)
    for title in ("off", SESSION):
        lines = exam.path(title).read_bytes().splitlines(keepends=True)
        exam.path(title).write_bytes(b"".join(lines[:-1]))
    assert take_both(exam_at(path), server) == {None: 1, "s": 1}


def test_file_that_is_no_exam_is_kept(server: Server, tmp_path: Path) -> None:
    exam = exam_at(tmp_path / "r.jsonl")
    exam.path("off").write_text("my notes\n")
    with pytest.raises(InvalidRequestError, match="no result file"):
        exam.take("off", None)
    assert exam.path("off").read_text() == "my notes\n"


def test_table_tells_who_answered(server: Server, tmp_path: Path) -> None:
    exam = exam_at(tmp_path / "r.jsonl")
    server.settings = {}
    header = replace(HEADER, model="m", server_version="1")
    header = replace(header, settings={"problems": 4, "samples": 1})
    sessions = {"off": None, SESSION: "abcd"}
    for title, digest in sessions.items():
        ttt = {"choice": {"read": "base"}} if digest is not None else None
        settings: dict[str, Any] = {"session": None, "session_digest": digest, "fork": None}
        write(exam.path(title), answers([True] * 4, ttt=ttt), header, **settings)
    assert take_both(exam, server) == {None: 0}
    shown = " ".join(exam.table().split())
    assert (
        "answered by the session** | | | | | | | r-humaneval-project-adapt@2 | 0.0% | 4 |" in shown
    )
    assert "unfinished" not in shown
