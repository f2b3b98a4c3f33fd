"""The loop: exact resume, what it writes, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from ponderttt.errors import InvalidRequestError
from tests.training.ppo.toys import ToyEnv, small_mdp
from training.ppo.checkpoint import CheckpointError, checkpoints
from training.ppo.config import PPOConfig
from training.ppo.network import NUM_FEATURES, ActorCritic
from training.ppo.normaliser import FeatureNormaliser
from training.ppo.pid import PIDConfig, PIDController
from training.ppo.recorder import STATISTICS_FILE, TENSORBOARD_DIR, IterationStats, mean_by_budget
from training.ppo.rollout import CombinedSource, InProcessSource
from training.ppo.trainer import CHECKPOINT_DIR, Trainer

BUDGETS = (1.5, 2.0)
CONFIG: dict[str, Any] = {
    "num_steps": 4,
    "iterations": 8,
    "minibatch_size": 40,
    "epochs": 2,
    "hidden_sizes": (8,),
    "learning_rate_decay": True,
    "entropy_decay": True,
    "seed": 7,
}


class PlugPulledError(Exception):
    """Somebody pulled the plug."""


def make(output: Path | None = None, gains: Any = None, **changes: Any) -> Trainer:
    options = {key: changes.pop(key) for key in ("env", "on_iteration") if key in changes}
    env = options.pop("env", None) or ToyEnv(small_mdp(), BUDGETS, num_envs=16)
    controller = PIDController(BUDGETS, PIDConfig(**(gains or {})))
    return Trainer(
        env,
        PPOConfig(**(CONFIG | changes)),
        controller,
        output=output,
        checkpoint_every=2,
        progress=False,
        **options,
    )


def stop_at(iteration: int) -> Any:
    def check(stats: IterationStats) -> None:
        if stats.iteration == iteration:
            raise PlugPulledError

    return check


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return trainer.network.state_dict()


def assert_same(first: Trainer, second: Trainer) -> None:
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name


# --- resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stopped", "kept"), [(4, 4), (5, 6)])  # between two, and right after
def test_run_interrupted_and_resumed_is_bitwise_the_uninterrupted(
    tmp_path: Path, stopped: int, kept: int
) -> None:
    whole = make(tmp_path / "whole")
    whole.train()
    with pytest.raises(PlugPulledError):
        make(tmp_path / "halves", on_iteration=stop_at(stopped)).train()
    rest = make(tmp_path / "halves")
    assert rest.resume() == kept
    rest.train()
    assert_same(whole, rest)
    assert whole.steps == rest.steps == 8 * 4 * 16
    texts = [(tmp_path / run / STATISTICS_FILE).read_text() for run in ("whole", "halves")]
    assert texts[0] == texts[1]
    assert torch.equal(whole.controller.multipliers, rest.controller.multipliers)


def test_run_of_the_same_seed_is_the_same_and_of_another_is_not() -> None:
    first, same, other = make(), make(), make(seed=8)
    histories = [trainer.train() for trainer in (first, same, other)]
    assert_same(first, same)
    assert histories[0] == histories[1]
    assert histories[0] != histories[2]


def test_run_neither_reads_nor_moves_the_global_generator() -> None:
    torch.manual_seed(1)
    before, first = torch.random.get_rng_state(), make()
    first.train()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second = make()
    second.train()
    assert_same(first, second)


def test_run_on_several_sources_resumes_exactly_too(tmp_path: Path) -> None:
    def sources() -> CombinedSource:
        envs = [ToyEnv(small_mdp(), BUDGETS, num_envs=6, seed=seed) for seed in (1, 2)]
        return CombinedSource([InProcessSource(env, 4, (8,), 9 + i) for i, env in enumerate(envs)])

    whole = make(env=sources())
    whole.train()
    with pytest.raises(PlugPulledError):
        make(tmp_path, env=sources(), on_iteration=stop_at(4)).train()
    rest = make(tmp_path, env=sources())
    rest.resume()
    rest.train()
    assert_same(whole, rest)


def test_run_that_is_prolonged_goes_on_from_its_end(tmp_path: Path) -> None:
    make(tmp_path, iterations=2).train()
    longer = make(tmp_path, iterations=5)
    assert longer.resume() == 2
    assert [stats.iteration for stats in longer.train()] == [2, 3, 4]


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    assert trainer.resume() == 0
    assert len(trainer.train()) == 8


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gamma": 0.5}, r"ppo\.gamma is 0\.99, this run has 0\.5"),
        ({"seed": 8}, r"ppo\.seed is 7, this run has 8"),
        ({"hidden_sizes": (9,)}, r"ppo\.hidden_sizes is \[8\], this run has \[9\]"),
        ({"gains": {"kp": 2.0}}, r"pid\.kp is 0\.3, this run has 2\.0"),
        ({"env": ToyEnv(small_mdp(), BUDGETS, num_envs=6)}, "num_envs is 16, this run has 6"),
    ],
)
def test_checkpoint_of_other_settings_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    make(tmp_path, iterations=2).train()
    with pytest.raises(CheckpointError, match=says):
        make(tmp_path, **changes).resume()


def test_checkpoint_that_is_damaged_is_refused_and_an_older_one_can_be_named(
    tmp_path: Path,
) -> None:
    make(tmp_path).train()
    older, newest = checkpoints(tmp_path / CHECKPOINT_DIR)[-2:]
    newest.write_bytes(newest.read_bytes()[:-3])
    trainer = make(tmp_path)
    with pytest.raises(CheckpointError, match=newest.name):
        trainer.resume()
    assert trainer.resume(older) == 6


# --- what it writes -------------------------------------------------------------------------------


def test_run_writes_a_line_and_scalars_per_iteration_and_its_last_checkpoints(
    tmp_path: Path,
) -> None:
    history = make(tmp_path).train()
    lines = [json.loads(line) for line in (tmp_path / STATISTICS_FILE).read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(8))
    assert lines[3]["update"]["approx_kl"] == history[3].update.approx_kl
    assert [row["budget"] for row in lines[3]["budgets"]] == list(BUDGETS)
    assert sum(lines[3]["actions"]) == pytest.approx(1.0)
    assert lines[3]["actions"][3] == 0.0  # not allowed
    mean = sum(row["cost"] for row in lines[3]["budgets"]) / 2
    assert lines[3]["cost"] == pytest.approx(mean)
    events = EventAccumulator(str(tmp_path / TENSORBOARD_DIR)).Reload()
    for name in ("budgets/1.5/cost", "budgets/2/multiplier", "actions/0", "update/entropy",
                 "update/explained_variance_cost", "time/steps_per_second", "reward"):  # fmt: skip
        assert [event.step for event in events.Scalars(name)] == list(range(8)), name
    assert events.Scalars("reward")[5].value == pytest.approx(history[5].reward)
    names = [path.name for path in checkpoints(tmp_path / CHECKPOINT_DIR)]
    assert names == [f"iteration-{number:06d}.safetensors" for number in (4, 6, 8)]


def test_run_without_an_output_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make().train()
    assert list(tmp_path.iterdir()) == []


def test_run_into_a_directory_that_holds_one_is_refused(tmp_path: Path) -> None:
    make(tmp_path, iterations=2).train()
    with pytest.raises(InvalidRequestError, match="holds a run already"):
        make(tmp_path).train()


def test_run_into_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequestError, match="output: cannot be written"):
        make(tmp_path / "file" / "run").train()


def test_costs_by_budget_are_means_over_its_own_steps_and_nan_without_one() -> None:
    costs = torch.tensor([[1.0, 12.0], [3.0, 5.0], [5.0, 1.0]])
    found = mean_by_budget(costs, torch.tensor([[0, 2], [0, 2], [0, 0]]), 3)
    assert found[0] == 2.5
    assert math.isnan(found[1])
    assert found[2] == 8.5


# --- what it starts from --------------------------------------------------------------------------


def test_network_given_is_trained_and_its_frozen_normaliser_kept() -> None:
    normaliser = FeatureNormaliser(
        NUM_FEATURES, [0.5] * NUM_FEATURES, [2.0] * NUM_FEATURES, frozen=True
    )
    network = ActorCritic((8,), seed=1, normaliser=normaliser)
    before = network.policy.actor.weight.detach().clone()
    env = ToyEnv(small_mdp(), BUDGETS, num_envs=16)
    config = PPOConfig(**(CONFIG | {"iterations": 1}))
    controller = PIDController(BUDGETS, PIDConfig())
    Trainer(env, config, controller, network=network, progress=False).train()
    assert not torch.equal(network.policy.actor.weight, before)
    assert network.normaliser.feature_mean == (0.5,) * NUM_FEATURES
    assert network.normaliser.feature_std == (2.0,) * NUM_FEATURES


def test_parts_that_do_not_fit_are_refused() -> None:
    env = ToyEnv(small_mdp(), BUDGETS, num_envs=2)
    config, controller = PPOConfig(**CONFIG), PIDController(BUDGETS, PIDConfig())
    with pytest.raises(InvalidRequestError, match="network"):
        Trainer(env, config, controller, network=ActorCritic((9,)))
    with pytest.raises(InvalidRequestError, match="controller"):
        Trainer(env, config, PIDController((9.0,), PIDConfig()))
