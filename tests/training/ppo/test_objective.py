"""The objective's pieces, and that the multiplier acts on what the gradient uses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.training.ppo.toys import ToyEnv, bandit
from training.ppo.config import PPOConfig
from training.ppo.learner import Learner
from training.ppo.network import ActorCritic
from training.ppo.objective import (
    approximate_kl,
    clipped_loss,
    constrained_advantages,
    explained_variance,
    normalise_by_budget,
)
from training.ppo.rollout import InProcessSource, RolloutBatch

FLOATS = st.floats(-10, 10)


def test_advantages_combined_use_the_multiplier_of_their_own_budget() -> None:
    found = constrained_advantages(
        torch.tensor([6.0, 6.0, 6.0]),
        torch.tensor([2.0, 2.0, 2.0]),
        torch.tensor([0.0, 1.0, -1.0]),
        torch.tensor([0, 1, 2]),
    )
    assert found.tolist() == [6.0, 2.0, 4.0]  # 6, (6-2)/2, (6+2)/2


def test_advantages_normalised_have_unit_deviation_under_every_budget() -> None:
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(0, 3, (50, 6), generator=generator)
    index[0, 0] = 3  # alone under its budget
    sizes = torch.tensor([0.01, 1.0, 500.0, 1.0])[index]
    advantages = (torch.randn(50, 6, generator=generator) + 2.0) * sizes
    found = normalise_by_budget(advantages, index, 5)
    for budget in range(3):
        mine = found[index == budget]
        assert float(mine.mean()) == pytest.approx(0.0, abs=1e-5)
        assert float(mine.std(correction=0)) == pytest.approx(1.0, abs=1e-4)
        order = advantages[index == budget].argsort()
        assert torch.equal(order, mine.argsort())
    assert found[0, 0] == 0.0


@given(log_ratio=st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_approximate_kl_is_never_negative(log_ratio: list[float]) -> None:
    assert float(approximate_kl(torch.tensor(log_ratio, dtype=torch.float64))) >= 0.0


def test_approximate_kl_over_samples_of_old_agrees_with_torch() -> None:
    old = torch.distributions.Categorical(logits=torch.tensor([0.3, -0.2, 1.0, 0.0]))
    new = torch.distributions.Categorical(logits=torch.tensor([0.5, 0.2, 0.4, 0.3]))
    # Every action as often as old takes it: the estimate is then exact.
    log_ratio = (new.logits - old.logits).repeat_interleave(
        (old.probs * 100_000).round().long(), dim=0
    )
    expected = torch.distributions.kl_divergence(old, new)
    torch.testing.assert_close(approximate_kl(log_ratio), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves"),
    [
        (1.0, 2.0, -2.0, True),
        (1.5, 2.0, -2.4, False),  # good, and far enough already
        (0.5, 2.0, -1.0, True),
        (0.5, -2.0, 1.6, False),  # bad, and far enough already
        (1.5, -2.0, 3.0, True),
    ],
)
def test_clipped_loss_stops_where_the_ratio_has_gone_far_enough(
    ratio: float, advantage: float, loss: float, moves: bool
) -> None:
    value = torch.tensor([ratio], requires_grad=True)
    found = clipped_loss(value, torch.tensor([advantage]), 0.2)
    found.backward()
    assert value.grad is not None
    assert found.item() == pytest.approx(loss)
    assert bool(value.grad != 0) is moves


def test_explained_variance_is_one_of_a_perfect_and_zero_of_a_constant_value() -> None:
    returns = torch.tensor([1.0, 2.0, 5.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.zeros(3), returns) == pytest.approx(0.0)
    assert explained_variance(torch.zeros(3), torch.ones(3)) is None


# --- the multiplier acts --------------------------------------------------------------------------


def rollout(network: ActorCritic, budgets: tuple[float, ...]) -> tuple[ToyEnv, RolloutBatch]:
    env = ToyEnv(bandit(), budgets, num_envs=256)
    source = InProcessSource(env, 4, (16,), seed=5)
    return env, source.collect(network.state_dict())


def cost_after_one_step(multipliers: list[float]) -> list[float]:
    """Mean cost of an undecided policy under each budget, after one gradient step."""
    network = ActorCritic((16,), seed=4)
    env, batch = rollout(network, (2.0,) * len(multipliers))
    config = PPOConfig(
        gamma=0.0,
        epochs=1,
        minibatch_size=10_000,
        entropy_coef=0.0,
        hidden_sizes=(16,),
        learning_rate=0.01,
    )
    Learner(network, config, seed=6).update(batch, torch.tensor(multipliers), 0)
    costs = torch.tensor([1.0, 3.0, 5.0, 12.0]).double().numpy()
    return [float((env.policy_of(network, k) @ costs).mean()) for k in range(len(multipliers))]


def test_multiplier_that_is_larger_makes_the_gradient_step_cheaper() -> None:
    costs = [cost_after_one_step([multiplier])[0] for multiplier in (-0.2, 0.0, 0.1, 0.3, 2.0)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1] + 0.2
    undecided = 5.25
    assert costs[1] > undecided > costs[-1]  # it changes the direction, not only the size


def test_multiplier_of_one_budget_makes_that_one_cheaper_than_the_other() -> None:
    first, second = cost_after_one_step([0.0, 2.0])
    assert first > second
    second, first = cost_after_one_step([2.0, 0.0])
    assert first > second
