"""Packages of the environment, and of folders that look like one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ponderttt.errors import InvalidRequestError
from tests.training.corpora.samples import CODE, intake, paths, write_files
from training.corpora import installed
from training.corpora.sources import load


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment of four packages: two share a namespace, one is in editable mode."""

    def package(name: str, files: list[str], **more: str) -> None:
        info = f"{name.replace('-', '_')}-1.0.dist-info"
        record = [*files, f"{info}/METADATA", "../../bin/tool", "gone.py"]
        write_files(root, {
            **{path: f"# {path}\nraise SystemExit\n".encode() for path in files},
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
            f"{info}/RECORD": "".join(f"{path},,\n" for path in record).encode(),
            **{f"{info}/{path}": text.encode() for path, text in more.items()},
        })  # fmt: skip

    root = tmp_path / "site"
    package("Space-One", ["space/one/a.py", "space/one/b.py"])
    package("space.two", ["space/two/a.py"])
    editable = '{"url": "file:///x", "dir_info": {"editable": true}}'
    package("edit", ["__editable__edit.py"], **{"direct_url.json": editable})
    package("ponderttt", ["ponderttt/x.py", "ponderttt/y.py"])
    write_files(root, {"broken-1.0.dist-info/METADATA": b"", "stray.py": CODE})
    monkeypatch.setattr(sys, "path", [str(root)])
    return root


@pytest.mark.usefixtures("environment")
def test_read_of_packages_in_one_namespace_keeps_them_apart(tmp_path: Path) -> None:
    (one,) = installed.read("space_one", intake(tmp_path))
    assert (one.name, one.source, one.revision) == ("space-one", "installed:space-one", "1.0")
    assert paths(one) == ["space/one/a.py", "space/one/b.py"]
    with pytest.raises(InvalidRequestError, match=r"name one of \['space-one', 'space-two'\]"):
        list(installed.read("space", intake(tmp_path)))


@pytest.mark.usefixtures("environment")
def test_read_of_all_leaves_out_our_own_editable_broken_and_small_ones(tmp_path: Path) -> None:
    everything = list(installed.read("*", intake(tmp_path)))
    assert [each.name for each in everything] == ["space-one", "space-two"]
    larger = installed.read("*", intake(tmp_path, min_documents=2))
    assert [each.name for each in larger] == ["space-one"]


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("name", "word"), [("edit", "editable"), ("ponderttt", "this project"), ("none", "not inst")]
)
def test_read_of_a_package_that_is_not_there_says_what_to_do(
    tmp_path: Path, name: str, word: str
) -> None:
    with pytest.raises(InvalidRequestError, match=word):
        list(installed.read(name, intake(tmp_path)))


def test_load_of_a_package_goes_by_the_name_of_its_distribution_or_import() -> None:
    (found,) = load("installed:filelock")
    assert "filelock/__init__.py" in paths(found)
    assert not any("dist-info" in path for path in paths(found))
    # PyYAML is imported as yaml.
    by_import = next(load("installed:yaml"))
    assert by_import == next(load("installed:PyYAML"))
    assert by_import.name == "pyyaml"
