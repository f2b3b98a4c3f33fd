"""PPO against linear programs: it reaches their optimum, within the budget, at their dual price."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.training.ppo.toys import Problem, ToyEnv, bandit, evaluate, small_mdp, solve
from training.ppo.config import PPOConfig
from training.ppo.pid import PIDConfig, PIDController
from training.ppo.recorder import IterationStats
from training.ppo.trainer import Trainer

SETTINGS: dict[str, Any] = {
    "gamma": 1.0,
    "entropy_coef": 0.1,
    "entropy_decay": True,
    "learning_rate": 3e-3,
    "learning_rate_decay": True,
    "target_kl": None,
    "minibatch_size": 512,
    "hidden_sizes": (32,),
    "iterations": 150,
}
BANDIT = PPOConfig(**SETTINGS, gae_lambda=1.0, num_steps=8)
MDP = PPOConfig(**SETTINGS, gae_lambda=0.7, num_steps=16)
GAINS = PIDConfig(kp=0.3, ki=0.02, kd=0.1, delta_decay=0.5)
IGNORED = PIDConfig(kp=0.0, ki=0.0, kd=0.0)


def learn(
    problem: Problem,
    budgets: tuple[float, ...],
    config: PPOConfig,
    gains: PIDConfig = GAINS,
    num_envs: int = 128,
) -> tuple[list[tuple[float, float]], list[IterationStats]]:
    """Exact reward and cost of what was learned, per budget; and the run's statistics."""
    env = ToyEnv(problem, budgets, num_envs)
    trainer = Trainer(env, config, PIDController(budgets, gains), progress=False)
    history = trainer.train()
    reached = [
        evaluate(problem, env.policy_of(trainer.network, index)) for index in range(len(budgets))
    ]
    return reached, history


def settled(history: list[IterationStats], budget: int) -> tuple[float, float]:
    """Mean and deviation of the multiplier over the last quarter of a run."""
    tail = [stats.budgets[budget].multiplier for stats in history[-len(history) // 4 :]]
    return float(np.mean(tail)), float(np.std(tail))


def check(problem: Problem, budgets: tuple[float, ...], config: PPOConfig, num_envs: int) -> None:
    reached, history = learn(problem, budgets, config, num_envs=num_envs)
    for index, budget in enumerate(budgets):
        best = solve(problem, budget)
        assert best.cost == pytest.approx(budget)  # the budget binds
        assert best.dual > 0.05
        reward, cost = reached[index]
        assert cost == pytest.approx(budget, rel=0.03)
        # What a cost slightly above the budget can buy is not counted.
        assert reward - best.dual * max(cost - budget, 0.0) >= 0.95 * best.reward
        mean, deviation = settled(history, index)
        assert mean == pytest.approx(best.dual, rel=0.25)
        assert deviation < 0.15 * best.dual


def test_linear_program_when_solved_agrees_with_the_policy_it_implies() -> None:
    # Two states of one context each, worked by hand: 1 of budget buys 1 of reward in the first
    # context and 0.5 in the second, half a step each; the first is filled up first.
    problem = Problem(
        reward=np.array([[0.0, 1.0], [0.0, 0.5]]),
        cost=np.array([[1.0, 2.0], [1.0, 2.0]]),
        transition=np.full((2, 2, 2), 0.5),
        start=np.array([0.5, 0.5]),
        stop=1.0,
    )
    best = solve(problem, 1.75)
    assert [best.reward, best.dual] == pytest.approx([0.625, 0.5])
    policy = np.array([[0.0, 1.0], [0.5, 0.5]])
    assert list(evaluate(problem, policy)) == pytest.approx([0.625, 1.75])


def test_bandit_with_two_budgets_in_one_policy_reaches_both_optima_at_their_prices() -> None:
    check(bandit(), (2.0, 4.0), BANDIT, num_envs=128)


def test_mdp_with_a_budget_reaches_the_occupancy_optimum_at_its_price() -> None:
    check(small_mdp(), (1.5,), MDP, num_envs=64)


@pytest.mark.parametrize(
    ("problem", "config"), [(bandit(), BANDIT), (small_mdp(), MDP)], ids=["bandit", "mdp"]
)
def test_budget_that_does_not_bind_leaves_the_multiplier_at_zero(
    problem: Problem, config: PPOConfig
) -> None:
    reached, history = learn(problem, (20.0,), config, num_envs=64)
    assert all(stats.budgets[0].multiplier == 0.0 for stats in history)
    best = solve(problem, 20.0)
    assert best.dual == 0.0
    assert reached[0][0] >= 0.95 * best.reward


def test_multiplier_that_does_not_act_lets_the_budget_be_broken() -> None:
    reached, _ = learn(bandit(), (2.0,), BANDIT, gains=IGNORED, num_envs=64)
    assert reached[0][1] > 2 * 2.0


def test_budget_above_the_best_cost_is_used_up_only_where_equality_is_asked_for() -> None:
    best, budget = solve(small_mdp(), 20.0), 3.0
    assert best.cost < 2.5
    gains = PIDConfig(kp=0.3, ki=0.02, kd=0.1, delta_decay=0.5, equality=True)
    reached, history = learn(small_mdp(), (budget,), MDP, gains=gains, num_envs=64)
    assert reached[0][1] == pytest.approx(budget, rel=0.05)
    assert settled(history, 0)[0] < -0.02
