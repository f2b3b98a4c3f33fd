"""From traces to a policy on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ponderttt.adaptation.actions import NOMINAL, Action
from ponderttt.adaptation.features import FEATURE_NAMES
from ponderttt.adaptation.policy import PolicyGate, load_policy
from ponderttt.engine.core import EngineCore
from ponderttt.errors import InvalidRequestError, PolicyFormatError
from tests.training import tiny
from training.environments.budgeted import HISTORY_COLUMNS
from training.gathering import engines_in, trace_source
from training.learning import (
    TraceSet,
    export_policy,
    fresh_network,
    load_traces,
    make_trainer,
    network_from,
)
from training.policy import policy
from training.ppo.network import ActorCritic
from training.recipe import Recipe
from training.rollouts.traces import TraceFormatError, read_traces


@pytest.fixture(scope="module")
def recorded(tiny_traces: Path, tiny_recipe: Recipe) -> TraceSet:
    return load_traces(tiny_traces, tiny_recipe)


def run(
    recipe: Path, traces: Path | None, output: Path, iterations: int = 4, **options: object
) -> bytes:
    """Train as the command does; the weights, byte for byte."""
    settings = {
        "model_scale": "unused", "recipe": str(recipe), "output": output,
        "traces": [] if traces is None else [traces],
        "num_iterations": iterations, "live_steps": 2, "init": None, "workers": 1, "seed": None,
        "resume": False, "device": "cpu", "quiet": True,
    }  # fmt: skip
    policy(**{**settings, **options})  # type: ignore[arg-type]
    return (output / "policy" / "policy.safetensors").read_bytes()


def test_episodes_come_by_set_with_all_their_chunks(recorded: TraceSet, tiny_traces: Path) -> None:
    header, records = read_traces(tiny_traces)
    for name, episodes in recorded.episodes.items():
        for episode in episodes:
            assert header.episodes[episode.name]["split"] == name
    found = [episode for episodes in recorded.episodes.values() for episode in episodes]
    assert sum(len(episode.gains) for episode in found) == len(records)
    assert {episode.repository for episode in recorded.episodes["test"]} == set(tiny.HELD_OUT)
    assert recorded.costs["nominal"] is NOMINAL
    measured = header.settings["costs"]["measured"]
    assert recorded.costs["measured"][Action.UPDATE_2] == measured["UPDATE_2"]


def test_several_files_are_taken_together_but_no_episode_twice(
    recorded: TraceSet, tiny_traces: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    header, *rest = tiny_traces.read_text().splitlines(keepends=True)
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    name = json.loads(rest[0])["episode"]
    first.write_text(header + "".join(each for each in rest if json.loads(each)["episode"] == name))
    second.write_text(
        header + "".join(each for each in rest if json.loads(each)["episode"] != name)
    )
    both = load_traces([first, second], tiny_recipe)
    for key, episodes in recorded.episodes.items():
        assert {e.name for e in both.episodes[key]} == {e.name for e in episodes}
    with pytest.raises(TraceFormatError, match=f"{name} is in an earlier file"):
        load_traces([first, first], tiny_recipe)


def test_traces_that_do_not_fit_are_refused(
    tiny_traces: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    other = replace(tiny_recipe, model="smollm2-135m")
    with pytest.raises(TraceFormatError, match=r"base_model is .*wanted 'smollm2-135m'"):
        load_traces(tiny_traces, other)
    other = replace(tiny_recipe, episodes=replace(tiny_recipe.episodes, chunk_size=64))
    with pytest.raises(TraceFormatError, match="chunk_size is 32"):
        load_traces(tiny_traces, other)
    path = tmp_path / "t.jsonl"
    header, first, *_ = tiny_traces.read_text().splitlines(keepends=True)
    path.write_text(header)
    with pytest.raises(TraceFormatError, match="holds no record"):
        load_traces(path, tiny_recipe)
    path.write_text(json.dumps({**json.loads(header), "episodes": {}}) + "\n" + first)
    with pytest.raises(TraceFormatError, match="is of no set of train"):
        load_traces(path, tiny_recipe)
    with pytest.raises(TraceFormatError, match="no trace file"):
        load_traces([], tiny_recipe)


def test_a_fresh_network_sees_features_of_mean_0_and_spread_1(
    recorded: TraceSet, tiny_recipe: Recipe
) -> None:
    episodes = recorded.episodes["train"]
    network = fresh_network(tiny_recipe, episodes, 0)
    rows = np.concatenate([episode.features for episode in episodes])
    moving = rows.std(0) > 1e-3
    moving[HISTORY_COLUMNS] = False
    normal = (torch.tensor(rows).double() - network.normaliser.mean) / network.normaliser.scale
    assert moving.sum() > 10
    torch.testing.assert_close(
        normal[:, moving].mean(0), torch.zeros(int(moving.sum())).double(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        normal[:, moving].std(0, correction=0), torch.ones(int(moving.sum())).double(),
        atol=1e-4, rtol=0,
    )  # fmt: skip
    before = network.normaliser.feature_mean
    network.normaliser.update(torch.rand(8, len(FEATURE_NAMES)))
    assert network.normaliser.feature_mean == before


def test_the_same_seed_gives_the_same_policy_byte_for_byte(
    tiny_recipe_file: Path, tiny_traces: Path, tmp_path: Path
) -> None:
    first = run(tiny_recipe_file, tiny_traces, tmp_path / "a")
    assert run(tiny_recipe_file, tiny_traces, tmp_path / "b") == first
    assert run(tiny_recipe_file, tiny_traces, tmp_path / "c", seed=1) != first
    # Resumed half-way, it is the same again.
    half = run(tiny_recipe_file, tiny_traces, tmp_path / "d", iterations=2)
    assert half != first
    assert run(tiny_recipe_file, tiny_traces, tmp_path / "d", resume=True) == first
    with pytest.raises(InvalidRequestError, match="holds a run already"):
        run(tiny_recipe_file, tiny_traces, tmp_path / "d")


def test_an_exported_policy_decides_as_the_network_did(
    recorded: TraceSet, tiny_recipe: Recipe, tiny_core: EngineCore, tmp_path: Path
) -> None:
    episodes = recorded.episodes["train"]
    network = fresh_network(tiny_recipe, episodes, 3)
    source = trace_source(tiny_recipe, episodes, recorded.costs, 3)
    make_trainer(tiny_recipe, source, network, None, iterations=2, seed=3, progress=False).train()
    export_policy(network, tiny_recipe, tmp_path, {"seed": 3}, {"gain": 0.5})
    gate = load_policy(tmp_path, tiny_core.model_name)
    features = torch.tensor(np.concatenate([episode.features for episode in episodes])).float()
    with torch.no_grad():
        expected = network.policy(network.normaliser(features))
    torch.testing.assert_close(gate.logits(features), expected, atol=1e-6, rtol=0)
    assert expected.std(0).min() > 0
    assert gate.metadata.budgets == tiny_recipe.budgets
    assert gate.metadata.training == {"seed": 3}
    assert gate.metadata.evaluation == {"gain": 0.5}
    with pytest.raises(PolicyFormatError, match="base_model"):
        load_policy(tmp_path, "smollm2-135m")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequestError, match="output"):
        export_policy(network, tiny_recipe, tmp_path / "file" / "p", {}, {})


def exported(recipe: Recipe, network: ActorCritic, folder: Path) -> PolicyGate:
    metadata = export_policy(network, recipe, folder, {}, {})
    return load_policy(folder, metadata.base_model)


def test_a_policy_can_be_the_start_of_another(
    recorded: TraceSet, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    episodes = recorded.episodes["train"]
    gate = exported(tiny_recipe, fresh_network(tiny_recipe, episodes, 5), tmp_path)
    features = torch.tensor(episodes[0].features).float()
    # Without a normalisation of its own, the network starts as the very same policy ...
    bare = network_from(gate, tiny_recipe, ActorCritic(tiny_recipe.ppo.hidden_sizes, 0))
    with torch.no_grad():
        logits = bare.policy(bare.normaliser(features))
    torch.testing.assert_close(logits, gate.logits(features), atol=1e-6, rtol=0)
    assert all(parameter.requires_grad for parameter in bare.parameters())
    # ... and with one, that one stays.
    other = fresh_network(tiny_recipe, episodes[:1], 0)
    kept = other.normaliser.feature_mean
    assert network_from(gate, tiny_recipe, other).normaliser.feature_mean == kept
    wide = replace(tiny_recipe, ppo=replace(tiny_recipe.ppo, hidden_sizes=(16,)))
    with pytest.raises(InvalidRequestError, match="init: has layers"):
        network_from(gate, wide, fresh_network(wide, episodes, 0))


def test_a_policy_is_trained_on_the_engine_from_one_trained_on_traces(
    tiny_recipe_file: Path, tiny_traces: Path, tmp_path: Path
) -> None:
    first = run(tiny_recipe_file, tiny_traces, tmp_path / "a", iterations=1)
    start = tmp_path / "a" / "policy"
    live = run(tiny_recipe_file, None, tmp_path / "b", iterations=1, init=start)
    assert live != first
    told = json.loads((tmp_path / "b" / "policy" / "policy.json").read_text())
    before = json.loads((start / "policy.json").read_text())
    assert told["training"]["source"] == "live"
    assert told["training"]["steps"] == 2 * 2
    assert told["feature_mean"] == pytest.approx(before["feature_mean"])


def test_training_on_the_engine_is_resumed_where_it_stopped(
    tiny_recipe_file: Path, tmp_path: Path
) -> None:
    whole = run(tiny_recipe_file, None, tmp_path / "a", iterations=3, live_steps=3)
    half = run(tiny_recipe_file, None, tmp_path / "b", iterations=1, live_steps=3)
    assert half != whole
    again = run(tiny_recipe_file, None, tmp_path / "b", iterations=3, live_steps=3, resume=True)
    assert again == whole


def test_more_workers_than_environments_are_refused(
    tiny_recipe_file: Path, tiny_traces: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequestError, match="workers: 5 for 4 environments"):
        run(tiny_recipe_file, tiny_traces, tmp_path, workers=5)


def test_engine_sources_are_opened_only_when_they_are_needed(tiny_recipe: Recipe) -> None:
    nowhere = replace(tiny_recipe, model="/nowhere")
    opened = engines_in(1, nowhere, 0, "cpu", False)
    with pytest.raises(Exception, match="nowhere"):
        opened()
