"""Small constrained problems whose optimum a linear program knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog
from torch import Tensor

from training.ppo.environment import Observation, StepResult
from training.ppo.network import NUM_ACTIONS, NUM_FEATURES, ActorCritic

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """A finite constrained decision problem; a bandit where every step ends the episode.

    Args:
        reward, cost: [S, A].
        transition: [S, A, S], rows sum to 1.
        start: [S], where episodes start.
        stop: probability that an episode ends after any step, whatever is done in it. It makes the
            undiscounted sum over an episode the same goal as the mean per step.
    """

    reward: Array
    cost: Array
    transition: Array
    start: Array
    stop: float

    @property
    def flow(self) -> Array:
        """[S, A, S]: where the step after a step is taken, a new episode's first included."""
        return (1 - self.stop) * self.transition + self.stop * self.start


@dataclass(frozen=True)
class Optimum:
    """The best mean reward per step within a mean cost, what that costs, and what a unit more of
    budget would buy."""

    reward: float
    cost: float
    dual: float


def bandit(seed: int = 3, contexts: int = 8) -> Problem:
    """Costs 1, 3, 5, 12 as nominal; rewards grow with cost, at a rate that differs by context."""
    rng = np.random.default_rng(seed)
    worth = rng.uniform(0.1, 1.6, size=(contexts, 1))
    reward = worth * np.array([0.0, 1.0, 1.5, 2.0]) + rng.normal(0, 0.02, size=(contexts, 4))
    reward[:, 0] = 0.0
    cost = np.tile([1.0, 3.0, 5.0, 12.0], (contexts, 1))
    uniform = np.full(contexts, 1 / contexts)
    return Problem(reward, cost, np.tile(uniform, (contexts, 4, 1)), uniform, stop=1.0)


def small_mdp() -> Problem:
    """A machine that wears: run it (0), run it hard (1) or service it (2), new, used or worn.

    Running hard pays at once and wears; servicing costs now and pays later. So a policy that looks
    one step ahead is far from the best.
    """
    reward = np.array([[1.0, 1.6, 0.0], [0.6, 1.0, 0.0], [0.1, 0.2, 0.0]])
    cost = np.array([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    transition = np.zeros((3, 3, 3))
    transition[0] = [[0.8, 0.2, 0.0], [0.4, 0.6, 0.0], [1.0, 0.0, 0.0]]
    transition[1] = [[0.0, 0.7, 0.3], [0.0, 0.4, 0.6], [0.9, 0.1, 0.0]]
    transition[2] = [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.9, 0.1, 0.0]]
    return Problem(reward, cost, transition, np.array([1.0, 0.0, 0.0]), stop=0.1)


def solve(problem: Problem, budget: float) -> Optimum:
    """The linear program over occupancies (Altman, Constrained Markov Decision Processes, 1999)."""
    states, actions = problem.reward.shape
    balance = np.repeat(np.eye(states), actions, axis=0) - problem.flow.reshape(-1, states)
    found = linprog(
        -problem.reward.ravel(),
        A_ub=problem.cost.ravel()[None],
        b_ub=[budget],
        A_eq=np.vstack([balance.T, np.ones(states * actions)]),
        b_eq=np.append(np.zeros(states), 1.0),
    )
    assert found.success
    cost = float(problem.cost.ravel() @ found.x)
    return Optimum(-found.fun, cost, -float(found.ineqlin.marginals[0]))


def evaluate(problem: Problem, policy: Array) -> tuple[float, float]:
    """Exact mean reward and cost per step of a policy, [S, A]."""
    chain = np.einsum("sa,sat->st", policy, problem.flow)
    states = len(chain)
    system = np.vstack([chain.T - np.eye(states), np.ones(states)])
    visits = np.linalg.lstsq(system, np.append(np.zeros(states), 1.0), rcond=None)[0]
    share = visits[:, None] * policy
    return float((share * problem.reward).sum()), float((share * problem.cost).sum())


class ToyEnv:
    """A problem as a vectorised environment; environment i is under budget i mod K.

    The features are the state, one-hot, and the budget, one-hot; actions that the problem does not
    have are not allowed.
    """

    def __init__(
        self, problem: Problem, budgets: tuple[float, ...], num_envs: int, seed: int = 0
    ) -> None:
        self.problem = problem
        self.num_envs, self.budgets = num_envs, budgets
        self.num_features, self.num_actions, self.num_budgets = (
            NUM_FEATURES,
            NUM_ACTIONS,
            len(budgets),
        )
        self._generator = torch.Generator().manual_seed(seed)
        self._tables = [
            torch.tensor(table, dtype=torch.float32) for table in (problem.reward, problem.cost)
        ]
        self._transition, self._start = (
            torch.tensor(problem.transition),
            torch.tensor(problem.start),
        )
        self._under = torch.arange(num_envs) % len(budgets)
        self._state = torch.zeros(num_envs, dtype=torch.int64)

    def observe(self, state: Tensor, under: Tensor) -> Observation:
        states, actions = self.problem.reward.shape
        features = torch.zeros(len(state), NUM_FEATURES)
        features.scatter_(1, state[:, None], 1.0)
        features.scatter_(1, states + under[:, None], 1.0)
        allowed = (torch.arange(NUM_ACTIONS) < actions).expand(len(state), -1)
        return Observation(features, allowed, under)

    def _draw(self, weights: Tensor) -> Tensor:
        return torch.multinomial(weights, 1, generator=self._generator)[:, 0]

    def reset(self) -> Observation:
        self._state = self._draw(self._start.expand(self.num_envs, -1))
        return self.observe(self._state, self._under)

    def step(self, actions: Tensor) -> StepResult:
        reward, cost = (table[self._state, actions] for table in self._tables)
        moved = self._draw(self._transition[self._state, actions])
        fresh = self._draw(self._start.expand(self.num_envs, -1))
        done = torch.rand(self.num_envs, generator=self._generator) < self.problem.stop
        self._state = torch.where(done, fresh, moved)
        return StepResult(self.observe(self._state, self._under), reward, cost, done)

    def state_dict(self) -> dict[str, Any]:
        return {"state": self._state, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state["state"]
        self._generator.set_state(state["generator"])

    @torch.no_grad()
    def policy_of(self, network: ActorCritic, budget: int) -> Array:
        """[S, A] probabilities under one of the budgets."""
        states, actions = self.problem.reward.shape
        seen = self.observe(torch.arange(states), torch.full((states,), budget))
        found = network(seen.features, seen.allowed).log_probs.exp()[:, :actions].double()
        return np.asarray(found / found.sum(1, keepdim=True))
