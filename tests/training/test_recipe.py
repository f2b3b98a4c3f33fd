"""Recipes: which are shipped, what a file may hold, and how its repositories are divided."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ponderttt.engine.core import EngineCore
from ponderttt.errors import InvalidRequestError
from tests.training import tiny
from training.recipe import (
    Recipe,
    episodes_by_split,
    load_recipe,
    load_split,
    parse_recipe,
    recipe_for,
)


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_a_shipped_recipe_names_releases_by_digest_and_holds_some_out(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.model == name
    specs = recipe.corpora.repositories
    assert all(spec.startswith("index:") and "#sha256=" in spec for spec in specs)
    names = {spec.removeprefix("index:").split("==")[0] for spec in specs}
    assert len(names) == len(specs)
    assert set(recipe.corpora.held_out) < names
    # What is not held out must not be tested on.
    assert recipe.corpora.shares[2] == 0.0


def test_a_model_without_a_recipe_gets_the_defaults_and_one_with_its_own() -> None:
    assert recipe_for("some/model") == Recipe("some/model")
    assert recipe_for("smollm2-135m") == load_recipe("smollm2-135m")
    assert recipe_for("other", "smollm2-135m") == load_recipe("smollm2-135m")


def test_a_file_gives_what_it_says_and_defaults_for_the_rest(tiny_recipe: Recipe) -> None:
    assert tiny_recipe.episodes.chunk_size == 32
    assert tiny_recipe.budgets == (1.5, 3.0)
    assert tiny_recipe.ppo.hidden_sizes == (8,)
    assert tiny_recipe.ppo.gamma == Recipe("m").ppo.gamma
    assert tiny_recipe.corpora.held_out == tiny.HELD_OUT


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"modle": "m"}, "model"),
        ({"model": "m", "budget": [2.0]}, "budget"),
        ({"model": "m", "ppo": {"gama": 0.9}}, r"ppo\.gama"),
        ({"model": "m", "collect": {"lanes": 2, "peek": 1}}, r"collect\.peek"),
        ({"model": "m", "corpora": {"seed": "x"}}, r"corpora\.seed"),
        ({"model": "m", "episodes": {"chunk_size": 0}}, "chunk_size"),
        ({"model": "m", "collect": {"behaviour": [1, 1, 1, 1]}}, "behaviour"),
        ({"model": "m", "reward": {"retention": 2}}, "retention"),
        ({"model": "m", "pid": {"kp": "x"}}, r"pid\.kp"),
        ({"model": "m", "ppo": {"clip": 0}}, "clip"),
        ({"model": "m", "budgets": [0.5]}, "budgets"),
        ({"model": "m", "budgets": []}, "budgets"),
        ({"model": "m", "budgets": [2, 2]}, "budgets"),
        ({"model": "m", "practised": [2]}, "practised"),
        ({"model": "m", "practised": [0.5]}, "practised"),
        ({"model": "m", "num_envs": 0}, "num_envs"),
        ({"model": "m", "reward_scale": 0}, "reward_scale"),
        ({"model": "m", "reward_scale": float("nan")}, "reward_scale"),
        ({"model": "m", "cost_model": "free"}, "cost_model"),
        ([1], "recipe"),
    ],
)
def test_a_wrong_recipe_is_refused_by_field(values: Any, named: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"mine.*{named}"):
        parse_recipe(json.dumps(values), "mine")


def test_an_unreadable_file_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"none\.json cannot be read"):
        load_recipe(str(tmp_path / "none.json"))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        load_recipe(str(tmp_path / "bytes.json"))
    (tmp_path / "cut.json").write_text('{"model": ')
    with pytest.raises(InvalidRequestError, match=r"cut\.json"):
        load_recipe(str(tmp_path / "cut.json"))
    for name in ("gpt-9", "../recipes/smollm2-135m", ""):
        with pytest.raises(InvalidRequestError, match=r"none of .*smollm2-135m"):
            load_recipe(name)


def test_held_out_repositories_are_the_test_set_and_nothing_else(tiny_recipe: Recipe) -> None:
    divided = load_split(tiny_recipe.corpora, progress=False)
    assert tuple(each.name for each in divided.test) == tiny.HELD_OUT
    others = {each.name for each in (*divided.train, *divided.validation)}
    assert others == set(tiny.REPOSITORIES) - set(tiny.HELD_OUT)
    assert divided.train
    assert divided.validation


def test_episodes_keep_to_the_recipe_and_to_their_sets(
    tiny_recipe: Recipe, tiny_core: EngineCore
) -> None:
    divided = load_split(tiny_recipe.corpora, progress=False)
    found = episodes_by_split(divided, tiny_core.tokenizer, tiny_recipe.episodes)
    assert {episode.repository for episode in found["test"]} == set(tiny.HELD_OUT)
    for episode in (episode for episodes in found.values() for episode in episodes):
        assert len(episode.chunks) == 6
        assert len(episode.documents) > 1
    too_long = replace(
        tiny_recipe.episodes, least_tokens=10_000, document_tokens=10_000, chunks=400
    )
    with pytest.raises(InvalidRequestError, match="corpora: no repository of the training set"):
        episodes_by_split(divided, tiny_core.tokenizer, too_long)
