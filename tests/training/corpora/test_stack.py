"""Data sets in the manner of The Stack, from local files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ponderttt.errors import InvalidRequestError
from tests.training.corpora.samples import intake, paths
from training.corpora import stack

datasets = pytest.importorskip("datasets")
HEADS = {"o/one": "1" * 40, "o/two": "2" * 40, "o/three": "3" * 40}


def rows(*, commit: bool = True) -> list[dict[str, Any]]:
    """Scattered rows of three repositories; o/two has one document, the others two."""
    order = ["o/one", "o/two", "o/three", "o/one", "o/three"]
    found = [
        {
            "max_stars_repo_name": name,
            "max_stars_repo_path": f"src/m{index}.py",
            "content": f"value = {index}\n",
            **({"max_stars_repo_head_hexsha": HEADS[name]} if commit else {}),
        }
        for index, name in enumerate(order)
    ]
    bad = [("src/x.rs", "fn main() {}\n"), ("../up.py", "x = 1\n"), ("e.py", ""), ("n.py", None),
           ("line.py", "x" * 20_000)]  # fmt: skip
    return [*found, *({**found[0], "max_stars_repo_path": p, "content": c} for p, c in bad)]


def lines(path: Path, found: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def parquet(path: Path) -> Path:
    datasets.Dataset.from_list(rows()).to_parquet(path)
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def test_read_groups_scattered_rows_by_repository(tmp_path: Path) -> None:
    found = list(stack.read(str(lines(tmp_path / "s.jsonl", rows())), intake(tmp_path)))
    assert [(each.name, paths(each)) for each in found] == [
        ("o/one", ["src/m0.py", "src/m3.py"]), ("o/two", ["src/m1.py"]),
        ("o/three", ["src/m2.py", "src/m4.py"]),
    ]  # fmt: skip
    assert {each.name: each.revision for each in found} == HEADS
    assert found[0].source == f"stack:{tmp_path / 's.jsonl'}"
    assert found[0].documents[1].text == "value = 3\n"


def test_read_of_parquet_and_of_a_folder_of_lines_gives_the_same(tmp_path: Path) -> None:
    lines(tmp_path / "d" / "0.jsonl", rows()[:3])
    lines(tmp_path / "d" / "1.jsonl", rows()[3:])
    read = [
        [(each.name, each.documents) for each in stack.read(str(path), intake(tmp_path))]
        for path in (parquet(tmp_path / "s.parquet"), tmp_path / "d")
    ]
    assert read[0] == read[1]
    assert len(read[0]) == 3


def test_read_keeps_to_the_limits(tmp_path: Path) -> None:
    spec = str(lines(tmp_path / "s.jsonl", rows()))

    def read(**limits: int) -> list[str]:
        return [each.name for each in stack.read(spec, intake(tmp_path, **limits))]

    assert read(min_documents=2) == ["o/one", "o/three"]
    assert read(min_documents=2, stack_repositories=1) == ["o/one"]
    assert read(stack_rows=2) == ["o/one", "o/two"]


def test_read_takes_the_columns_of_other_data_sets(tmp_path: Path) -> None:
    row = {"repo_name": "o/r", "path": "a.rs", "code": "fn main() {}\n"}
    (found,) = stack.read(str(lines(tmp_path / "s.json", [row])), intake(tmp_path, "rust"))
    assert (found.name, paths(found)) == ("o/r", ["a.rs"])
    assert found.revision == f"sha256:{found.sha256}"


def test_read_without_a_text_column_says_which_there_are(tmp_path: Path) -> None:
    row = {"repo_name": "o/r", "path": "a.py", "blob_id": "12"}
    with pytest.raises(InvalidRequestError, match=r"none of the columns content, .*blob_id"):
        list(stack.read(str(lines(tmp_path / "s.jsonl", [row])), intake(tmp_path)))


def test_read_of_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRequestError, match="must hold parquet files or JSON lines"):
        list(stack.read(str(tmp_path / "empty"), intake(tmp_path)))
    whole = parquet(tmp_path / "s.parquet").read_bytes()
    (tmp_path / "s.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidRequestError, match="can't be read"):
        list(stack.read(str(tmp_path / "s.parquet"), intake(tmp_path)))


def test_read_of_a_name_asks_the_hub_for_configuration_or_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(path: str, **options: Any) -> list[dict[str, Any]]:
        asked.append((path, options))
        return rows()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for spec in ("o/set", "o/set:Python", "o/set:data/python"):
        assert len(list(stack.read(spec, intake(tmp_path)))) == 3
    stream = {"split": "train", "streaming": True}
    assert asked == [
        ("o/set", stream), ("o/set", {**stream, "name": "Python"}),
        ("o/set", {**stream, "data_dir": "data/python"}),
    ]  # fmt: skip


def test_read_where_the_hub_refuses_passes_on_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InvalidRequestError, match="ConnectionError: no route; check"):
        list(stack.read("o/set", intake(tmp_path)))


def test_read_without_the_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidRequestError, match="pip install datasets"):
        list(stack.read("o/set", intake(tmp_path)))
