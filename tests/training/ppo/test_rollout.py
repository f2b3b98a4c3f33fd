"""Rollouts: what is recorded, how sources combine, and what an environment may not give."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ponderttt.errors import InvalidRequestError
from tests.training.ppo.toys import ToyEnv, bandit, small_mdp
from training.ppo.environment import StepResult
from training.ppo.network import ActorCritic
from training.ppo.rollout import (
    CombinedSource,
    InProcessSource,
    RolloutBatch,
    RolloutSource,
    concatenate,
)

SIZES = (8,)


def source(env: ToyEnv, num_steps: int = 6, seed: int = 1) -> InProcessSource:
    return InProcessSource(env, num_steps, SIZES, seed)


def policy() -> dict[str, Tensor]:
    return ActorCritic(SIZES, seed=2).state_dict()


def equal(a: RolloutBatch, b: RolloutBatch) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(RolloutBatch))


class Changed(ToyEnv):
    """A toy whose steps are changed on the way out."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(small_mdp(), (2.0,), num_envs=3)
        self.changes = changes

    def step(self, actions: Tensor) -> StepResult:
        result = super().step(actions)
        if "observation" in self.changes:
            observation = replace(result.observation, **self.changes["observation"])
            return replace(result, observation=observation)
        return replace(result, **self.changes)


def test_rollout_records_what_the_environment_and_the_policy_did() -> None:
    env = ToyEnv(small_mdp(), (2.0, 3.0), num_envs=40)
    batch = source(env).collect(policy())
    state = batch.features[..., :3].argmax(-1)
    reward, cost = (torch.tensor(t).float() for t in (env.problem.reward, env.problem.cost))
    assert torch.equal(batch.rewards, reward[state, batch.actions])
    assert torch.equal(batch.costs, cost[state, batch.actions])
    assert torch.equal(batch.budget_index, (torch.arange(40) % 2).expand(6, -1))
    assert torch.equal(batch.features[1:], batch.next_features[:-1])
    assert torch.equal(batch.done, batch.terminated)
    assert batch.done.any()
    network = ActorCritic(SIZES)
    network.load_state_dict(policy())
    log_probs = network(batch.features, batch.allowed).log_probs
    expected = log_probs.gather(-1, batch.actions[..., None])[..., 0]
    torch.testing.assert_close(batch.log_probs, expected.detach())


def test_rollout_of_an_episode_cut_off_keeps_its_last_features() -> None:
    done, cut = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    last = torch.full((3, 32), 7.0)
    batch = source(Changed(done=done, truncated=cut, final_features=last)).collect(policy())
    assert (batch.next_features[:, 0] == 7.0).all()
    assert torch.equal(batch.next_features[:-1, 1:], batch.features[1:, 1:])
    assert torch.equal(batch.terminated[0], torch.tensor([False, True, False]))


def test_rollouts_one_after_the_other_run_on_where_the_last_stopped() -> None:
    whole = source(ToyEnv(small_mdp(), (2.0,), 5), num_steps=8).collect(policy())
    parts = source(ToyEnv(small_mdp(), (2.0,), 5), num_steps=4)
    halves = [parts.collect(policy()) for _ in range(2)]
    for field in fields(RolloutBatch):
        joined = torch.cat([getattr(half, field.name) for half in halves])
        assert torch.equal(joined, getattr(whole, field.name))


def test_source_restored_gathers_what_the_other_would_have() -> None:
    first, second = (source(ToyEnv(small_mdp(), (2.0,), 5)) for _ in range(2))
    assert first.state_dict()["observation"] is None
    first.collect(policy())
    second.load_state_dict(first.state_dict())
    assert equal(first.collect(policy()), second.collect(policy()))


def test_sources_combined_give_their_rollouts_side_by_side_and_restore() -> None:
    def pair() -> list[InProcessSource]:
        return [
            source(ToyEnv(small_mdp(), (2.0,), 5, seed=1), seed=3),
            source(ToyEnv(small_mdp(), (2.0,), 2, seed=2), seed=4),
        ]

    combined, restored, apart = CombinedSource(pair()), CombinedSource(pair()), pair()
    assert isinstance(combined, RolloutSource)
    assert combined.num_envs == 7
    batch = combined.collect(policy())
    left, right = (one.collect(policy()) for one in apart)
    assert torch.equal(batch.actions, torch.cat((left.actions, right.actions), 1))
    assert torch.equal(batch.next_features, torch.cat((left.next_features, right.next_features), 1))
    restored.load_state_dict(combined.state_dict())
    assert equal(combined.collect(policy()), restored.collect(policy()))


def test_sources_that_do_not_fit_together_are_refused() -> None:
    first = source(ToyEnv(bandit(), (2.0,), 2))
    second = source(ToyEnv(bandit(), (3.0,), 2), num_steps=4)
    with pytest.raises(InvalidRequestError, match="sources"):
        CombinedSource([first, second])
    with pytest.raises(InvalidRequestError, match="sources"):
        CombinedSource([])
    with pytest.raises(InvalidRequestError, match=r"\[4, 6\] steps"):
        concatenate([first.collect(policy()), second.collect(policy())])


NAN = torch.tensor([0.0, float("nan"), 0.0])


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"reward": NAN}, "env.reward"),
        ({"reward": torch.zeros(3, 1)}, "env.reward"),
        ({"cost": NAN}, "env.cost"),
        ({"cost": torch.zeros(3, dtype=torch.float64)}, "env.cost"),
        ({"done": torch.zeros(3)}, "env.done"),
        ({"done": torch.zeros(3) > 0, "truncated": torch.ones(3) > 0}, "env.truncated"),
        ({"done": torch.ones(3) > 0, "truncated": torch.ones(3) > 0}, "env.final_features"),
        ({"observation": {"features": torch.full((3, 32), torch.inf)}}, "env.features"),
        ({"observation": {"features": torch.zeros(2, 32)}}, "env.features"),
        ({"observation": {"allowed": torch.zeros(3, 4) > 0}}, "env.allowed"),
        ({"observation": {"budget_index": torch.tensor([0, 1, 0])}}, "env.budget_index"),
        ({"observation": {"budget_index": torch.tensor([0, -1, 0])}}, "env.budget_index"),
    ],
)
def test_environment_that_gives_something_unusable_is_refused_by_name(
    changes: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        source(Changed(**changes)).collect(policy())
    assert caught.value.param == param


@pytest.mark.parametrize(("name", "value"), [("num_features", 31), ("num_actions", 3)])
def test_environment_of_another_width_is_refused(name: str, value: int) -> None:
    env = ToyEnv(bandit(), (2.0,), 2)
    setattr(env, name, value)
    with pytest.raises(InvalidRequestError, match=f"{name}: {value}; the policy has"):
        source(env)
