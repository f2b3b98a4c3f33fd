"""Result files: nothing finished is lost, and no two runs are mixed."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.results import Header, ResultFile, read_results
from clients.shapes import fields, text
from ponderttt.errors import InvalidRequestError, PonderError

HEADER = Header(
    kind="repo",
    seed=1,
    model="tiny",
    base_url="http://here",
    server_version="0.1.0",
    settings={"files": 4, "arms": ["off", "policy@2"]},
    key_fields=("task", "sample"),
    metrics={"passed": "higher"},
)


def test_result_file_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.jsonl"
    with ResultFile.open(path, HEADER) as results:
        results.append({"task": "a", "sample": 0, "passed": True})
    other = replace(HEADER, base_url="http://there", started="later", run="other")
    with ResultFile.open(path, other) as again:
        assert again.header.run == HEADER.run
        assert (again.resumed, again.done) == (1, {("a", 0)})
        again.append({"task": "a", "sample": 1, "passed": False, "text": "é\n\ud800"})
    header, records = read_results(path)
    assert (header.base_url, header.settings) == ("http://here", HEADER.settings)
    assert [record["sample"] for record in records] == [0, 1]


@given(cut=st.integers(min_value=1, max_value=60))
def test_line_cut_off_while_it_was_written_costs_only_its_unit(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "r.jsonl"
    with ResultFile.open(path, HEADER) as results:
        for sample in range(3):
            results.append({"task": "a", "sample": sample, "text": "x" * 60})
    path.write_bytes(path.read_bytes()[:-cut])
    assert len(read_results(path)[1]) == 2
    with ResultFile.open(path, HEADER) as again:
        assert again.done == {("a", 0), ("a", 1)}
        again.append({"task": "a", "sample": 2, "text": "again"})
    assert [record["sample"] for record in read_results(path)[1]] == [0, 1, 2]


def test_header_cut_off_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(HEADER.as_dict())[:40])
    with ResultFile.open(path, HEADER) as results:
        assert results.resumed == 0
    assert read_results(path)[0].model == "tiny"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed 1, now 2"),
        ({"model": "other"}, "model 'tiny', now 'other'"),
        ({"settings": {"files": 5, "arms": ["off", "policy@2"]}}, "files 4, now 5"),
        ({"settings": {"files": 4}}, "arms"),
        ({"kind": "humaneval"}, "kind"),
        ({"server_version": "0.2.0"}, "server_version"),
    ],
)
def test_run_with_other_settings_is_refused_by_name(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    path = tmp_path / "r.jsonl"
    ResultFile.open(path, HEADER).close()
    before = path.read_bytes()
    with pytest.raises(InvalidRequestError, match=named):
        ResultFile.open(path, replace(HEADER, **change))  # type: ignore[arg-type]
    assert path.read_bytes() == before
    ResultFile.open(path, HEADER).close()


LEARNS = {"server.gate": "policy", "server.rule.learning_rate": 0.01}


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (
            LEARNS,
            LEARNS | {"server.rule.learning_rate": 0.5, "server.read": "session"},
            r"a run with server\.read None, now 'session'; server\.rule\.learning_rate 0\.01, now "
            r"0\.5\. Give the same settings and start the server as it was then to go on with it, "
            r"or name another file with --output",
        ),
        (
            {},
            LEARNS,
            r"r\.jsonl was begun by a version that did not note the server's settings; it can be "
            r"compared but not gone on with: name another file with --output, or give --fresh$",
        ),
        (
            {"files": 4},
            LEARNS,
            r"did not note the server's settings, of a run with files 4, now None; it can be",
        ),
        (LEARNS, {"files": 4}, "files None, now 4; settings of the server, which now tells none"),
    ],
)
def test_run_on_a_server_that_learns_otherwise_is_refused_by_name(
    tmp_path: Path, before: dict[str, object], after: dict[str, object], told: str
) -> None:
    path = tmp_path / "r.jsonl"
    ResultFile.open(path, replace(HEADER, settings=before)).close()
    with pytest.raises(InvalidRequestError, match=told):
        ResultFile.open(path, replace(HEADER, settings=after))
    ResultFile.open(path, replace(HEADER, settings=before)).close()


@pytest.mark.parametrize("content", ["some notes\n", "[1, 2]\n", '{"a": 1}\n', "no end of line"])
def test_file_of_another_sort_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(InvalidRequestError, match="no result file"):
        ResultFile.open(path, HEADER)
    assert path.read_text() == content


def test_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with ResultFile.open(path, HEADER) as results:
        results.append({"task": "a", "sample": 0})
        results.append({"task": "b", "sample": 0})
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:5], lines[2]]) + "\n")
    with pytest.raises(PonderError, match=r"line 2.*remove the later lines of the same repository"):
        read_results(path)


def test_second_run_on_the_same_file_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with ResultFile.open(path, HEADER):
        with pytest.raises(PonderError, match="another run"):
            ResultFile.open(path, HEADER)
        assert read_results(path)[1] == []
    ResultFile.open(path, HEADER).close()


def test_fresh_run_throws_the_old_records_away(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with ResultFile.open(path, replace(HEADER, seed=9)) as results:
        results.append({"task": "a", "sample": 0})
    ResultFile.open(path, HEADER, fresh=True).close()
    assert (read_results(path)[0].seed, read_results(path)[1]) == (1, [])


def test_records_from_many_threads_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with ResultFile.open(path, HEADER) as results:

        def work(task: int) -> None:
            for sample in range(5):
                results.append({"task": task, "sample": sample, "text": "y" * 2000})

        threads = [threading.Thread(target=work, args=(task,)) for task in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    keys = {(record["task"], record["sample"]) for record in read_results(path)[1]}
    assert keys == {(task, sample) for task in range(4) for sample in range(5)}


def test_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="doesn't exist or is empty"):
        read_results(tmp_path / "none.jsonl")


def test_directory_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PonderError, match="can't be"):
        ResultFile.open(tmp_path, HEADER)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_is_named_and_the_file_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with ResultFile.open(path, HEADER) as results:
        results.append({"task": "a", "sample": 0})
    with (
        full_disk(path.stat().st_size + 5),
        pytest.raises(PonderError, match="can't be written: File too large"),
        ResultFile.open(path, HEADER) as results,
    ):
        results.append({"task": "a", "sample": 1, "text": "x" * 100})
    with ResultFile.open(path, HEADER) as again:
        assert again.done == {("a", 0)}


def test_run_that_began_afresh_does_not_go_on_by_beginning_afresh(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with ResultFile.open(path, HEADER, fresh=True) as results:
        assert results.how_to_go_on() == "run the same command again without --fresh to go on"
    with ResultFile.open(path, HEADER) as results:
        assert results.how_to_go_on() == "run the same command again to go on"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"task": "a"}, "sample is missing"),
        ({"task": ["a"], "sample": 0}, r"task is \['a'\], not a text or a number"),
        ({"task": "a", "sample": 0, "passed": "x"}, "passed is 'x', not a number, true or false"),
        ({"task": "a", "sample": 0, "passed": float("nan")}, "passed is nan, not a number"),
    ],
)
def test_record_that_reports_would_stumble_over_is_named(
    tmp_path: Path, line: dict[str, object], told: str
) -> None:
    path = tmp_path / "r.jsonl"
    with ResultFile.open(path, HEADER) as results:
        results.append({"task": "a", "sample": 0, "passed": None})
        # A lesson, say, has no such metric.
        results.append({"task": "b", "sample": 0})
    assert len(read_results(path)[1]) == 2
    with path.open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    expected = rf"r\.jsonl is damaged, line 4: {told}.*; mend or remove the line"
    with pytest.raises(PonderError, match=expected):
        read_results(path)
    with pytest.raises(PonderError, match=expected):
        ResultFile.open(path, HEADER)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    ResultFile.open(path, HEADER).close()


def test_run_checks_what_its_own_records_must_hold(tmp_path: Path) -> None:
    path, check = tmp_path / "r.jsonl", fields({"text": text})
    with ResultFile.open(path, HEADER, check=check) as results:
        results.append({"task": "a", "sample": 0, "text": "x"})
        results.append({"task": "b", "sample": 0, "text": None})
    # Whose file it is comes first.
    with pytest.raises(InvalidRequestError, match="seed 1, now 2"):
        ResultFile.open(path, replace(HEADER, seed=2), check=check)
    with pytest.raises(PonderError, match="line 3: text is None, not a text"):
        ResultFile.open(path, HEADER, check=check)
    ResultFile.open(path, HEADER).close()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"key_fields": "task"}, "key_fields is 'task', not a list"),
        ({"metrics": ["passed"]}, r"metrics is \['passed'\], not an object"),
        ({"settings": None}, "settings is None, not an object"),
    ],
)
def test_damaged_header_is_named(tmp_path: Path, change: dict[str, object], told: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(HEADER.as_dict() | change) + "\n")
    with pytest.raises(PonderError, match=f"damaged, line 1: {told}"):
        read_results(path)
