"""Local directories, and what is common to all sources."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from ponderttt.errors import InvalidRequestError
from tests.training.corpora.samples import CODE, paths, write_files
from training.corpora.filters import Limits
from training.corpora.sources import load, load_all

BAD = {
    "binary.py": b"\0\1\2" * 100,
    "empty.py": b"\n\n",
    "latin.py": b"# \xe4\n",
    "line.py": b"x = '" + b"a" * 900_000 + b"'\n",
    "large.py": b"x = 1\n" * 200_000,
}


def test_load_of_a_directory_takes_source_files_and_nothing_else(tmp_path: Path) -> None:
    root = write_files(
        tmp_path / "project",
        BAD | {
            "b.py": CODE, "a/c.py": b"y = 1\n", "a/d.rs": b"fn main() {}\n", "README.md": b"x\n",
            "vendor/x.py": b"v\n", "build/x.py": b"b\n", ".venv/x.py": b"h\n", ".x.py": b"h\n",
        },
    )  # fmt: skip
    (root / "link.py").symlink_to(root / "b.py")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.py")
    (found,) = load(str(root))
    assert (found.name, found.source, paths(found)) == ("project", str(root), ["a/c.py", "b.py"])
    assert found.documents[1].text == CODE.decode()
    assert found.documents[1].language == "python"
    (both,) = load(str(root), languages=["python", "rust"])
    assert paths(both) == ["a/c.py", "a/d.rs", "b.py"]
    assert both.documents[1].language == "rust"


def test_load_of_a_directory_whose_names_are_no_unicode_gives_valid_paths(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path / "r")
    os.mkdir(root)
    with open(root + b"/\xff.py", "wb") as file:
        file.write(CODE)
    (found,) = load(str(tmp_path / "r"))
    assert paths(found) == ["\\xff.py"]
    assert found.sha256


def test_load_of_only_bad_files_warns_and_gives_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_files(tmp_path / "bad", BAD)
    with caplog.at_level(logging.INFO):
        assert list(load(str(root))) == []
    summary, warning = caplog.messages
    for reason in ("binary", "empty", "not UTF-8", "a line too long", "too large"):
        assert f"1 {reason}" in summary
    assert "bad has no documents in python" in warning


@pytest.mark.parametrize("spec", ["", "  ", "git:", "index: ", "missing/folder", "svn:x", "stack:"])
def test_load_of_no_source_says_what_a_spec_looks_like(spec: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"corpus: .*give a directory"):
        list(load(spec))


def test_load_of_a_file_or_an_unknown_language_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_bytes(CODE)
    with pytest.raises(InvalidRequestError, match="is a file; give a directory"):
        list(load(str(file)))
    with pytest.raises(InvalidRequestError, match="languages: 'cobol'"):
        list(load(str(tmp_path), languages=["cobol"]))


def test_load_all_sorts_by_name_and_goes_on_after_a_source_without_documents(
    tmp_path: Path,
) -> None:
    for name in ("b", "a", "c"):
        write_files(tmp_path / name, {"x.py": CODE})
    (tmp_path / "empty").mkdir()
    specs = [str(tmp_path / name) for name in ("b", "empty", "a", "c")]
    found = load_all(specs, limits=Limits(file_bytes=100))
    assert [each.name for each in found] == ["a", "b", "c"]
    assert load_all(specs[::-1]) == found


def test_load_all_where_two_have_one_name_is_refused(tmp_path: Path) -> None:
    one = write_files(tmp_path / "one" / "src", {"x.py": CODE})
    two = write_files(tmp_path / "two" / "src", {"y.py": CODE})
    with pytest.raises(InvalidRequestError, match="two repositories are called 'src'"):
        load_all([str(one), str(two)])


def test_load_all_of_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, {"x.rs": b"fn main() {}\n"})
    for specs in ([str(tmp_path)], []):
        with pytest.raises(InvalidRequestError, match="no documents in python"):
            load_all(specs)


def test_load_all_without_a_terminal_shows_no_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_all([str(write_files(tmp_path / "r", {"x.py": CODE}))])
    assert capsys.readouterr() == ("", "")
