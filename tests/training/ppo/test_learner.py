"""One update: the KL stop, the values, and what is restored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.training.ppo.toys import ToyEnv, bandit, evaluate
from training.ppo.config import PPOConfig
from training.ppo.learner import Learner
from training.ppo.network import ActorCritic
from training.ppo.rollout import InProcessSource, RolloutBatch

BASE: dict[str, Any] = {
    "gamma": 0.0,
    "hidden_sizes": (16,),
    "minibatch_size": 128,
    "learning_rate": 3e-3,
}


def make(**changes: Any) -> tuple[Learner, InProcessSource]:
    config = PPOConfig(**(BASE | changes))
    source = InProcessSource(ToyEnv(bandit(), (2.0,), 64), 8, (16,), seed=1)
    return Learner(ActorCritic((16,), seed=2), config, seed=3), source


def collect(learner: Learner, source: InProcessSource) -> RolloutBatch:
    return source.collect(learner.network.state_dict())


def test_update_takes_every_minibatch_of_every_epoch_where_nothing_stops_it() -> None:
    learner, source = make(target_kl=None, epochs=3, minibatch_size=200)
    stats = learner.update(collect(learner, source), torch.zeros(1), 0)
    assert stats.optimiser_steps == 3 * 3  # 512 rows: 200, 200 and 112
    assert not stats.stopped_early


def test_update_stops_once_the_policy_has_moved_as_far_as_allowed() -> None:
    learner, source = make(target_kl=0.001, epochs=50, learning_rate=0.02)
    free, _ = make(target_kl=None, epochs=50, learning_rate=0.02)
    batch = collect(learner, source)
    stats, without = (each.update(batch, torch.zeros(1), 0) for each in (learner, free))
    assert stats.stopped_early
    assert 1 <= stats.optimiser_steps < 50
    assert stats.approx_kl < 0.1 * without.approx_kl


def test_values_after_many_updates_explain_both_returns() -> None:
    learner, source = make(target_kl=None, learning_rate=0.01)
    for _ in range(20):
        batch = collect(learner, source)
        stats = learner.update(batch, torch.zeros(1), 0)
    values = learner.network.values(batch.features)
    # What can be known before the action is the mean over actions, not the outcome.
    assert isinstance(source.env, ToyEnv)
    policy = source.env.policy_of(learner.network, 0)
    for value, truth in zip(values, evaluate(source.env.problem, policy), strict=True):
        assert value.mean().item() == pytest.approx(truth, rel=0.1)
    assert stats.explained_variance_reward is not None
    assert stats.explained_variance_reward > 0.5


def test_rewards_in_another_unit_teach_the_same() -> None:
    results = []
    for unit in (1.0, 1000.0):
        learner, source = make(target_kl=None)
        for _ in range(3):
            batch = collect(learner, source)
            batch.rewards.mul_(unit)
            learner.update(batch, torch.zeros(1), 0)
        results.append(learner.network.policy.actor.weight.detach())
    torch.testing.assert_close(results[0], results[1], atol=2e-3, rtol=0)


def test_entropy_bonus_when_large_keeps_the_policy_undecided() -> None:
    entropies = []
    for weight in (0.0, 5.0):
        learner, source = make(target_kl=None, entropy_coef=weight)
        for _ in range(15):
            stats = learner.update(collect(learner, source), torch.zeros(1), 0)
        entropies.append(stats.entropy)
    assert entropies[0] < 1.2
    assert entropies[1] > 1.33  # ln 4 is 1.386


def test_learner_restored_learns_the_same_bit_for_bit() -> None:
    first, source = make()
    second, _ = make()
    first.update(collect(first, source), torch.zeros(1), 0)
    second.load_state_dict(first.state_dict())
    batch = collect(first, source)
    assert first.update(batch, torch.ones(1), 1) == second.update(batch, torch.ones(1), 1)
    theirs = second.network.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in first.network.state_dict().items())


@pytest.mark.parametrize(("cut_off", "expected"), [(False, 0.0), (True, 10.0)])
def test_episode_cut_off_counts_the_value_of_what_would_have_come(
    cut_off: bool, expected: float
) -> None:
    learner, source = make(gamma=1.0)
    batch = collect(learner, source)
    assert batch.done.all()
    if cut_off:
        batch = replace(batch, terminated=torch.zeros_like(batch.done))
    head = learner.network.value_reward
    head.mean.fill_(10.0)  # the weights are zero: every state is worth 10
    learner.update(batch, torch.zeros(1), 0)
    # The head's scale starts with the mean of the returns.
    assert head.mean.item() == pytest.approx(batch.rewards.mean().item() + expected, abs=1e-4)
