"""Episodes replayed from traces, under the rules of serving."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ponderttt.adaptation.actions import NOMINAL, Action, CostModelName
from ponderttt.adaptation.features.history import HISTORY
from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import InvalidRequestError
from ponderttt.sessions.session import Session
from tests.training.environments.recorded import COSTS, recorded, rules
from training.environments.budgeted import HISTORY_COLUMNS, BudgetRules
from training.environments.trace_env import TraceEnv
from training.ppo.environment import check_observation, check_step


def wanted(env: TraceEnv, allowed: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random allowed action for each environment."""
    return torch.multinomial(allowed.float(), 1, generator=generator)[:, 0]


@given(
    seed=st.integers(0, 2**31),
    budget=st.sampled_from([1.0, 1.5, 2.0, 3.0, 6.5]),
    chunks=st.integers(2, 150),
    greed=st.sampled_from(["dearest allowed", "any allowed", "any"]),
    whole=st.booleans(),
    cost_model=st.sampled_from(["nominal", "measured"]),
)
@settings(max_examples=25, deadline=None)
def test_enforced_budget_is_never_exceeded(
    seed: int, budget: float, chunks: int, greed: str, whole: bool, cost_model: CostModelName
) -> None:
    told = rules(budget, cost_model=cost_model)
    env = TraceEnv([recorded(seed, chunks)], told, 1, whole_share=float(whole), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    observation, costs = env.reset(), []
    while True:
        allowed = observation.allowed
        action = wanted(env, allowed if greed != "any" else torch.ones(1, 4), generator)
        if greed == "dearest allowed":
            action = torch.tensor([max(a for a in Action if allowed[0, a])])
        result = env.step(action)
        if allowed[0, int(action)]:
            assert float(result.cost) == pytest.approx(COSTS[cost_model][Action(int(action))])
        costs.append(float(result.cost))
        observation = result.observation
        if result.done[0]:
            break
    assert len(costs) == chunks
    assert np.mean(costs) <= budget + 1e-6
    windows = np.lib.stride_tricks.sliding_window_view(costs, min(64, chunks)).mean(-1)
    assert chunks < 64 or windows.max() <= budget + 1e-6


def test_observations_and_steps_are_well_formed() -> None:
    env = TraceEnv([recorded(n, 7, (2,)) for n in range(3)], rules(1.5, 3.0), 4, seed=1)
    check_observation(env.reset(), env)
    for _ in range(20):
        check_step(env.step(torch.zeros(4, dtype=torch.int64)), env)


def test_rewards_are_the_recorded_gains_and_costs_the_actions() -> None:
    episode = recorded(5, 6)
    env = TraceEnv([episode], rules(12.0), 1, reward_scale=0.5)
    env.reset()
    for position, action in enumerate([1, 3, 0, 2, 1, 0]):
        result = env.step(torch.tensor([action]))
        assert float(result.reward) == pytest.approx(0.5 * episode.gains[position, action])
        assert float(result.cost) == NOMINAL[Action(action)]
    assert bool(result.done)


def test_action_that_the_budget_does_not_pay_for_is_cut_down() -> None:
    episode = recorded(5, 6)
    env = TraceEnv([episode], rules(2.0), 1)
    # Six chunks at 2: an UPDATE_2 (5) leaves 7 for five more, an UPDATE_4 (12) nothing.
    assert env.reset().allowed[0].tolist() == [True, True, True, False]
    result = env.step(torch.tensor([3]))
    assert float(result.cost) == NOMINAL[Action.UPDATE_2]
    assert float(result.reward) == pytest.approx(episode.gains[0, Action.UPDATE_2])
    (kept,) = env.state_dict()["runs"]
    assert kept["taken"] == [Action.UPDATE_2]


def test_unenforced_budget_allows_everything_and_charges_what_was_asked_for() -> None:
    env = TraceEnv([recorded(5, 6)], rules(1.0, enforced=False), 1)
    observation = env.reset()
    for _ in range(6):
        assert observation.allowed.all()
        result = env.step(torch.tensor([3]))
        assert float(result.cost) == NOMINAL[Action.UPDATE_4]
        observation = result.observation


def test_history_features_are_those_of_a_served_session() -> None:
    episode, budget = recorded(3, 9, (4,)), 3.0
    env = TraceEnv([episode], rules(budget), 1)
    session = Session("served", TTTParams(), ephemeral=True, state=None)
    observation = env.reset()
    actions = iter([1, 0, 2, 1, 0, 1, 0, 0])
    for position in range(9):
        action = Action.SKIP
        if episode.learnable[position]:
            # As the engine asks for them.
            credit = session.ledger.credit(NOMINAL, budget)
            history = session.history(budget, credit, 8 - position)
            expected = [feature(history) for feature in HISTORY.features]
            assert observation.features[0, HISTORY_COLUMNS].tolist() == pytest.approx(expected)
            assert credit == budget * position - session.ledger.totals["nominal"]
            rest = [i for i in range(32) if not HISTORY_COLUMNS.start <= i < HISTORY_COLUMNS.stop]
            assert observation.features[0, rest].tolist() == pytest.approx(
                episode.features[position, rest].tolist(), rel=1e-5
            )
            action = Action(next(actions))
            if action > max(a for a in Action if observation.allowed[0, a]):
                action = Action.SKIP
            observation = env.step(torch.tensor([action])).observation
        session.ledger.charge(action, {"nominal": NOMINAL, "measured": NOMINAL}, 0.0)
        session.record(float(episode.losses[position]), NOMINAL[action])


def test_chunks_that_cannot_be_learned_are_passed_over_but_paid_for() -> None:
    episode = recorded(2, 6, (0, 3, 5))
    env = TraceEnv([episode], rules(2.0), 1)
    env.reset()
    steps = 0
    while not bool(env.step(torch.tensor([0])).done):
        steps += 1
    assert steps + 1 == 3
    (run,) = env._runs
    assert run.session.ledger.chunks == 1, "a new episode began, and its first chunk is paid for"


def test_all_episodes_come_up_equally_often_under_every_budget() -> None:
    env = TraceEnv([recorded(n, 2) for n in range(5)], rules(1.5, 3.0), 3, seed=4)
    seen: Counter[int] = Counter()
    budgets: Counter[int] = Counter()
    observation = env.reset()
    for _ in range(200):
        for run in env._runs:
            if run.position == 0:
                seen[run.episode] += 1
        budgets.update(observation.budget_index.tolist())
        observation = env.step(torch.zeros(3, dtype=torch.int64)).observation
    assert max(seen.values()) - min(seen.values()) <= 2
    assert 0.8 < budgets[0] / budgets[1] < 1.25


def test_text_that_comes_document_by_document_allows_less_at_once() -> None:
    # Documents of three chunks: two are known to follow at first, or eight.
    episode = recorded(1, 9)
    allowed = []
    for share in (0.0, 1.0):
        env = TraceEnv([episode], rules(2.0), 1, whole_share=share)
        allowed.append(env.reset().allowed[0].tolist())
    assert allowed == [[True, True, False, False], [True, True, True, False]]
    mixed = TraceEnv([episode], rules(2.0), 64, whole_share=0.5, seed=3)
    assert 16 < int(mixed.reset().allowed[:, 2].sum()) < 48


def test_resumed_environment_goes_on_exactly() -> None:
    def make(seed: int) -> TraceEnv:
        told = [recorded(n, 5 + n, (1,)) for n in range(4)]
        return TraceEnv(told, rules(1.5, 3.0), 3, whole_share=0.5, seed=seed)

    generator = torch.Generator().manual_seed(0)
    env = make(7)
    observation = env.reset()
    for _ in range(5):
        observation = env.step(wanted(env, observation.allowed, generator)).observation
    twin = make(8)
    kept = env.state_dict()
    parts = [run for run in kept["runs"] if not run["whole"]]
    assert any(len(run["taken"]) < 2 for run in parts), "a text is coming document by document"
    assert kept["deck"], "some episodes of this round are still to come"
    twin.load_state_dict(kept)
    for _ in range(20):
        actions = wanted(env, observation.allowed, generator)
        first, second = env.step(actions), twin.step(actions)
        for name in ("reward", "cost", "done"):
            assert torch.equal(getattr(first, name), getattr(second, name))
        for name in ("features", "allowed", "budget_index"):
            mine = getattr(first.observation, name)
            assert torch.equal(mine, getattr(second.observation, name))
        observation = first.observation


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: TraceEnv([], rules(), 1), "episodes"),
        (lambda: TraceEnv([recorded(0, 2, (0, 1))], rules(), 1), "episodes"),
        (lambda: TraceEnv([recorded(0, 2)], rules(), 0), "num_envs"),
        (lambda: TraceEnv([recorded(0, 2)], rules(), 1, whole_share=1.5), "whole_share"),
        (lambda: BudgetRules((), {"nominal": NOMINAL}), "budgets"),
        (lambda: BudgetRules((2.0, 2.0), {"nominal": NOMINAL}), "budgets"),
        (lambda: BudgetRules((2.0,), {"nominal": NOMINAL}, "measured"), "cost_model"),
    ],
)
def test_bad_input_is_named(make: object, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make()  # type: ignore[operator]
    assert caught.value.param == field


def test_state_of_other_episodes_is_refused_and_changes_nothing() -> None:
    env = TraceEnv([recorded(0, 3), recorded(1, 4)], rules(), 2)
    env.reset()
    for other in ([recorded(0, 3)], [recorded(0, 3), recorded(2, 4)]):
        twin = TraceEnv(other, rules(), 2)
        twin.reset()
        before = twin.state_dict()["runs"]
        with pytest.raises(InvalidRequestError, match="begun with"):
            twin.load_state_dict(env.state_dict())
        assert twin.state_dict()["runs"] == before


@pytest.mark.parametrize(
    ("actions", "says"), [([0, 0, 0], "shape"), ([0, 4], "4 lies outside"), ([-1, 0], "-1 lies")]
)
def test_actions_that_cannot_be_are_refused(actions: list[int], says: str) -> None:
    env = TraceEnv([recorded(0, 3)], rules(), 2)
    env.reset()
    with pytest.raises(InvalidRequestError, match=says):
        env.step(torch.tensor(actions))
