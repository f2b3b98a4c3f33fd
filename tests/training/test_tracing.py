"""From a recipe to a trace file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ponderttt.adaptation.actions import Action
from ponderttt.engine.core import EngineCore
from ponderttt.errors import InvalidRequestError
from tests.training import tiny
from training.corpora import record
from training.recipe import SPLITS, Recipe, load_split
from training.rollouts.episodes import Episode
from training.rollouts.traces import TraceFormatError, read_traces
from training.tracing import collect_traces, in_turns, open_core, split_names


def copy_of(traces: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return Path(shutil.copy(traces, folder / "copy.jsonl"))


def test_every_chunk_of_every_set_is_recorded_once(
    tiny_traces: Path, tiny_core: EngineCore
) -> None:
    header, records = read_traces(tiny_traces)
    assert {values["repository"] for values in header.episodes.values()} == set(tiny.REPOSITORIES)
    expected = {
        (name, index)
        for name, values in header.episodes.items()
        for index in range(values["chunks"])
    }
    assert len(records) == len(expected)
    assert {(each.episode, each.index) for each in records} == expected
    tests = {each["repository"] for each in header.episodes.values() if each["split"] == "test"}
    assert tests == set(tiny.HELD_OUT)
    assert header.base_model == tiny_core.model_name
    costs = header.settings["costs"]
    assert costs["nominal"] == {"SKIP": 1.0, "UPDATE_1": 3.0, "UPDATE_2": 5.0, "UPDATE_4": 12.0}
    assert costs["measured"].keys() == {action.name for action in Action}


def test_the_record_of_the_corpora_lies_beside_the_traces(
    tiny_traces: Path, tiny_recipe: Recipe
) -> None:
    kept = record.read(tiny_traces.with_suffix(".corpora.json"))
    record.check(load_split(tiny_recipe.corpora, progress=False), kept)


def test_collecting_again_adds_nothing(
    tiny_traces: Path, tiny_recipe: Recipe, tiny_core: EngineCore, tmp_path: Path
) -> None:
    path = copy_of(tiny_traces, tmp_path)
    whole = path.read_bytes()
    collect_traces(tiny_recipe, tiny_core, path, SPLITS, progress=False)
    assert path.read_bytes() == whole


def test_an_interrupted_collection_is_completed_with_the_same_outcomes(
    tiny_traces: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    path, core = copy_of(tiny_traces, tmp_path), open_core(tiny_recipe)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-4]) + lines[-4][:30])
    collect_traces(tiny_recipe, core, path, SPLITS, progress=False)
    again = {(each.episode, each.index): each for each in read_traces(path)[1]}
    assert len(again) == len(path.read_bytes().splitlines()) - 1 == len(lines) - 1
    for each in read_traces(tiny_traces)[1]:
        found = again[each.episode, each.index]
        assert found.action == each.action
        assert found.next == pytest.approx(each.next, rel=1e-4)
        assert found.own == pytest.approx(each.own, rel=1e-4)


def test_a_file_of_another_model_or_seed_is_refused_and_left_alone(
    tiny_traces: Path, tiny_recipe: Recipe, tiny_core: EngineCore, tmp_path: Path
) -> None:
    path = copy_of(tiny_traces, tmp_path)
    header, *rest = path.read_text().splitlines(keepends=True)
    values = json.loads(header)
    path.write_text(json.dumps({**values, "base_model": "other"}) + "\n" + "".join(rest))
    before = path.read_bytes()
    with pytest.raises(TraceFormatError, match="another base_model"):
        collect_traces(tiny_recipe, tiny_core, path, SPLITS, progress=False)
    path.write_text(header)
    before = path.read_bytes()
    seeded = replace(tiny_recipe, collect=replace(tiny_recipe.collect, seed=1))
    with pytest.raises(TraceFormatError, match="another seed"):
        collect_traces(seeded, tiny_core, path, SPLITS, progress=False)
    assert path.read_bytes() == before
    assert not path.with_suffix(".corpora.json").exists()


def test_an_output_that_cannot_be_written_is_refused(
    tiny_recipe: Recipe, tiny_core: EngineCore, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequestError, match=r"output: .* cannot be written"):
        collect_traces(
            tiny_recipe, tiny_core, tmp_path / "file" / "t.jsonl", SPLITS, progress=False
        )


def test_an_empty_corpus_and_an_empty_set_are_refused(
    tiny_recipe: Recipe, tiny_core: EngineCore, tmp_path: Path
) -> None:
    (tmp_path / "nothing").mkdir()
    path = tmp_path / "t.jsonl"
    corpora = replace(tiny_recipe.corpora, repositories=(str(tmp_path / "nothing"),), held_out=())
    with pytest.raises(InvalidRequestError, match="corpus: no documents"):
        collect_traces(
            replace(tiny_recipe, corpora=corpora), tiny_core, path, SPLITS, progress=False
        )
    corpora = replace(tiny_recipe.corpora, held_out=(), shares=(0.75, 0.25, 0.0))
    with pytest.raises(InvalidRequestError, match="splits: test: no episode"):
        collect_traces(
            replace(tiny_recipe, corpora=corpora), tiny_core, path, ("test",), progress=False
        )
    assert not path.exists()


def test_sets_take_turns_in_proportion_to_their_sizes() -> None:
    groups = [
        [Episode(f"{name}{index}", name, (), (), 32) for index in range(count)]
        for name, count in (("a", 6), ("b", 2), ("c", 0))
    ]
    order = "".join(episode.repository for episode in in_turns(groups))
    assert sorted(order) == sorted("aaaaaabb")
    # Half-way through, half of each has come.
    assert order[:4].count("b") == 1
    names = [episode.name for episode in in_turns(groups) if episode.repository == "a"]
    assert names == [episode.name for episode in groups[0]]


def test_names_of_sets_are_checked() -> None:
    assert split_names(()) == SPLITS
    assert split_names(["test", "train", "test"]) == ("train", "test")
    with pytest.raises(InvalidRequestError, match="'dev' is none of train, validation, test"):
        split_names(["test", "dev"])
