"""Gates: what they want, and how their wishes settle at the budget."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ponderttt.adaptation.actions import NOMINAL, Action, CostModel
from ponderttt.adaptation.gates import (
    Decision,
    FixedGate,
    Gate,
    OffGate,
    RandomGate,
    ThresholdGate,
    ThresholdState,
    update_rate,
    within_budget,
)
from ponderttt.adaptation.ledger import Ledger

CHEAP = CostModel(
    "measured",
    {Action.SKIP: 1.0, Action.UPDATE_1: 1.9, Action.UPDATE_2: 2.7, Action.UPDATE_4: 4.4},
)
MODELS = {"nominal": NOMINAL, "measured": CHEAP}
EVERYTHING = frozenset(Action)


def _no_features() -> Tensor:
    raise AssertionError("this gate does not need the features")


def decision(
    loss: float = 1.0,
    budget: float | None = 2.0,
    costs: CostModel = NOMINAL,
    state: ThresholdState | None = None,
    key: str = "0/0",
    allowed: frozenset[Action] = EVERYTHING,
) -> Decision:
    return Decision(loss, _no_features, allowed, budget, costs, state or ThresholdState(), key)


def updates(losses: Iterable[float], budget: float, costs: CostModel = NOMINAL) -> list[bool]:
    """What the threshold gate does with a stream of losses."""
    state, gate = ThresholdState(), ThresholdGate()
    actions = [gate.choose(decision(loss, budget, costs, state)) for loss in losses]
    assert set(actions) <= {Action.SKIP, Action.UPDATE_1}
    return [action is Action.UPDATE_1 for action in actions]


def _stationary(noise: random.Random, at: int) -> float:
    return noise.gauss(2.0, 0.3)


def _falling(noise: random.Random, at: int) -> float:
    return 4.0 - 0.001 * at + noise.gauss(0.0, 0.2)


def _rising(noise: random.Random, at: int) -> float:
    return 1.0 + 0.002 * at + noise.gauss(0.0, 0.2)


def _decaying_smoothly(noise: random.Random, at: int) -> float:
    return 5.0 * 0.998**at


def _jumping(noise: random.Random, at: int) -> float:
    return 1.0 + 3.0 * (at // 50 % 2) + noise.gauss(0.0, 0.1)


def _heavy_tailed(noise: random.Random, at: int) -> float:
    return noise.lognormvariate(0.0, 1.5)


def _constant(noise: random.Random, at: int) -> float:
    return 2.0


STREAMS = [
    _stationary, _falling, _rising, _decaying_smoothly, _jumping, _heavy_tailed, _constant,
]  # fmt: skip
Stream = Callable[[random.Random, int], float]


def losses_of(stream: Stream, count: int) -> list[float]:
    noise = random.Random(7)
    return [stream(noise, at) for at in range(count)]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    ("budget", "costs"), [(1.25, NOMINAL), (2.0, NOMINAL), (2.8, NOMINAL), (1.45, CHEAP)]
)
def test_threshold_on_any_stream_updates_at_the_rate_that_the_budget_pays_for(
    stream: Stream, budget: float, costs: CostModel
) -> None:
    done = updates(losses_of(stream, 2000), budget, costs)
    target = update_rate(budget, costs)
    assert sum(done) / len(done) == pytest.approx(target, abs=0.01)
    # Not by catching up at the end: every stretch has its share.
    for start in range(0, len(done), 250):
        assert sum(done[start : start + 250]) / 250 == pytest.approx(target, abs=0.08)


def test_threshold_after_a_stream_without_variation_is_not_wound_up() -> None:
    losses = [2.0] * 1000 + losses_of(_stationary, 400)
    done = updates(losses, 2.0)[1000:]
    assert sum(done[:100]) == pytest.approx(50, abs=12)


def test_threshold_on_noise_updates_the_chunks_with_the_higher_losses() -> None:
    losses = losses_of(_stationary, 2000)
    done = updates(losses, 2.0)
    learned = [loss for loss, update in zip(losses, done, strict=True) if update]
    skipped = [loss for loss, update in zip(losses, done, strict=True) if not update]
    assert sum(learned) / len(learned) > sum(skipped) / len(skipped) + 0.2


@pytest.mark.parametrize(("budget", "rate"), [(1.0, 0), (3.0, 1), (5.0, 1), (12.0, 1)])
def test_threshold_at_the_ends_of_the_budget_updates_never_or_always(
    budget: float, rate: int
) -> None:
    assert updates(losses_of(_stationary, 50), budget) == [bool(rate)] * 50


def test_threshold_without_a_budget_updates_always() -> None:
    gate, state = ThresholdGate(), ThresholdState()
    wanted = [gate.choose(decision(x, None, state=state)) for x in losses_of(_falling, 20)]
    assert set(wanted) == {Action.UPDATE_1}


def test_threshold_is_not_raised_by_what_the_ledger_refuses() -> None:
    gate, state = ThresholdGate(), ThresholdState()
    for loss in losses_of(_stationary, 200):
        gate.choose(decision(loss, state=state, allowed=frozenset({Action.SKIP})))
    # So it wants to update nearly everything now, as soon as it may.
    wanted = [gate.choose(decision(loss, state=state)) for loss in losses_of(_stationary, 20)]
    assert wanted.count(Action.UPDATE_1) >= 18


def test_threshold_of_two_sessions_keeps_their_states_apart() -> None:
    gate, mine, other = ThresholdGate(), ThresholdState(), ThresholdState()
    noise = random.Random(3)
    losses = [noise.gauss(2.0, 0.3) for _ in range(200)]
    alone = updates(losses, 2.0)
    mixed = []
    for loss in losses:
        mixed.append(gate.choose(decision(loss, state=mine)) is Action.UPDATE_1)
        gate.choose(decision(10 * noise.random(), state=other))
    assert mixed == alone


@pytest.mark.parametrize("costs", [NOMINAL, CHEAP])
@pytest.mark.parametrize("budget", [1.0, 1.3, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0, 12.0])
def test_random_over_many_chunks_costs_the_budget_in_the_mean(
    budget: float, costs: CostModel
) -> None:
    drawn = [
        RandomGate().choose(decision(budget=budget, costs=costs, key=f"0/{at}"))
        for at in range(6000)
    ]
    affordable = min(budget, costs[Action.UPDATE_4])
    # Four standard errors of a mix of two costs that are 7 apart at most.
    assert sum(costs[a] for a in drawn) / len(drawn) == pytest.approx(affordable, abs=0.19)
    # A mix of two neighbours, or one action where the budget is its cost.
    assert max(drawn) - min(drawn) <= 1


@pytest.mark.parametrize("action", list(Action))
def test_random_at_exactly_an_actions_cost_draws_that_action_alone(action: Action) -> None:
    drawn = {
        RandomGate().choose(decision(budget=NOMINAL[action], key=f"s/{at}")) for at in range(300)
    }
    assert drawn == {action}


def test_random_with_the_same_key_draws_the_same() -> None:
    def draw(key: str) -> Action:
        return RandomGate().choose(decision(budget=2.0, key=key))

    first = [draw(f"1/{at}") for at in range(200)]
    assert [draw(f"1/{at}") for at in range(200)] == first
    assert [draw(f"2/{at}") for at in range(200)] != first


def test_random_without_a_budget_takes_the_strongest_action() -> None:
    assert RandomGate().choose(decision(budget=None)) is Action.UPDATE_4


@pytest.mark.parametrize("budget", [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 8.0, 12.0])
def test_random_under_the_ledger_spends_most_of_the_budget_and_never_more(budget: float) -> None:
    ledger = Ledger()
    for at in range(3000):
        allowed = ledger.allowed(NOMINAL, budget, ahead=2999 - at)
        wanted = RandomGate().choose(decision(budget=budget, key=f"0/{at}"))
        ledger.charge(within_budget(wanted, allowed), MODELS, 0.0)
    assert 0.9 * budget <= ledger.accounts["nominal"].mean <= budget


@pytest.mark.parametrize("action", list(Action))
def test_fixed_whatever_the_chunk_wants_its_action(action: Action) -> None:
    assert FixedGate(action).choose(decision(loss=0.0)) is action
    assert FixedGate(action).choose(decision(loss=9.0, budget=1.0)) is action


def test_fixed_under_a_budget_is_cut_down_to_what_is_allowed() -> None:
    ledger, actions = Ledger(), []
    for _ in range(12):
        wanted = FixedGate(Action.UPDATE_4).choose(decision(budget=3.0))
        actions.append(within_budget(wanted, ledger.allowed(NOMINAL, 3.0)))
        ledger.charge(actions[-1], MODELS, 0.0)
    assert set(actions) == {Action.UPDATE_1}


def test_off_whatever_the_chunk_never_learns() -> None:
    assert OffGate().choose(decision(loss=99.0, budget=None)) is Action.SKIP


@given(st.sampled_from(list(Action)), st.frozensets(st.sampled_from(list(Action))))
def test_within_budget_gives_the_strongest_allowed_action_up_to_the_wish(
    wanted: Action, others: frozenset[Action]
) -> None:
    allowed = others | {Action.SKIP}
    got = within_budget(wanted, allowed)
    assert got in allowed
    assert got <= wanted
    assert not any(got < action <= wanted for action in allowed)


@pytest.mark.parametrize(
    ("budget", "costs", "rate"),
    [
        (1.0, NOMINAL, 0.0), (2.0, NOMINAL, 0.5), (3.0, NOMINAL, 1.0), (12.0, NOMINAL, 1.0),
        (1.45, CHEAP, 0.5), (1.9, CHEAP, 1.0), (None, NOMINAL, 1.0),
    ],
)  # fmt: skip
def test_update_rate_of_a_budget_is_the_share_of_updates_it_pays_for(
    budget: float | None, costs: CostModel, rate: float
) -> None:
    assert update_rate(budget, costs) == pytest.approx(rate)


@pytest.mark.parametrize(
    "gate", [OffGate(), FixedGate(Action.UPDATE_1), RandomGate(), ThresholdGate()]
)
def test_gates_without_a_policy_never_ask_for_the_features(gate: Gate) -> None:
    assert gate.choose(decision()) in Action
