"""The controller: a sequence worked by hand, and what must hold for any."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ponderttt.errors import InvalidRequestError
from training.ppo.pid import PIDConfig, PIDController

COSTS = st.lists(st.floats(0.0, 12.0), min_size=1, max_size=30)


def run(controller: PIDController, costs: list[float]) -> list[float]:
    return [float(controller.update(torch.tensor([cost]))[0]) for cost in costs]


def test_multiplier_over_a_sequence_equals_the_one_worked_by_hand() -> None:
    # Budget 2, kp 0.5, ki 0.1, kd 1, both decays 0.5, delay 2, integral at most 4.
    #
    # cost  Δ    I = clamp(I+Δ)     smoothed Δ           smoothed cost  2 before  rise
    # 4     2    2                  2                    4              4         0
    # 6     4    min(6, 4) = 4      (2 + 4)/2 = 3        (4+6)/2 = 5    4         1
    # 2     0    4                  (3 + 0)/2 = 1.5      (5+2)/2 = 3.5  4         -0.5 → 0
    # 0    -2    2                  (1.5 - 2)/2 = -0.25  1.75           5         → 0
    # 0    -2    0                  -1.125               0.875          3.5       → 0
    # 10    8    4                  3.4375               5.4375         1.75      3.6875
    config = PIDConfig(
        kp=0.5, ki=0.1, kd=1.0, integral_max=4.0, delta_decay=0.5, cost_decay=0.5, delay=2
    )
    found = run(PIDController((2.0,), config), [4.0, 6.0, 2.0, 0.0, 0.0, 10.0])
    by_hand = [
        0.5 * 2 + 0.1 * 2 + 0,  # 1.2
        0.5 * 3 + 0.1 * 4 + 1,  # 2.9
        0.5 * 1.5 + 0.1 * 4 + 0,  # 1.15
        0.5 * -0.25 + 0.1 * 2 + 0,  # 0.075
        0.0,  # -0.5625, not below zero
        0.5 * 3.4375 + 0.1 * 4 + 3.6875,  # 5.80625
    ]
    assert found == pytest.approx(by_hand)


def test_multiplier_with_equality_falls_below_zero_to_its_bound_by_hand() -> None:
    config = PIDConfig(kp=0.1, ki=0.1, kd=0.0, integral_max=3.0, delta_decay=0.0, equality=True)
    # Budget 5: Δ = -2, -2, -2, 1; I = -2, -3, -3, -2; λ = 0.1 Δ + 0.1 I, at least -0.3.
    found = run(PIDController((5.0,), config), [3.0, 3.0, 3.0, 6.0])
    assert found == pytest.approx([-0.3, -0.3, -0.3, -0.1])


@given(costs=COSTS)
def test_multiplier_of_an_inequality_is_never_negative_and_its_integral_bounded(
    costs: list[float],
) -> None:
    config = PIDConfig(kp=0.2, ki=0.5, kd=0.3, integral_max=5.0)
    controller = PIDController((3.0,), config)
    assert min(run(controller, costs)) >= 0.0
    assert 0.0 <= float(controller.state_dict()["integral"][0]) <= 5.0


@given(costs=COSTS)
def test_integral_alone_while_inside_its_bounds_is_dual_ascent(costs: list[float]) -> None:
    config = PIDConfig(kp=0.0, ki=0.1, kd=0.0, integral_max=1e6)
    expected, found = 0.0, run(PIDController((3.0,), config), costs)
    for cost, multiplier in zip(costs, found, strict=True):
        expected = max(0.0, expected + 0.1 * (cost - 3.0))
        assert multiplier == pytest.approx(expected, abs=1e-5)


def test_windup_after_a_long_violation_is_unwound_within_the_bound() -> None:
    gains: dict[str, Any] = {"kp": 0.0, "ki": 1.0, "kd": 0.0}
    costs = [10.0] * 100 + [2.0] * 5
    bounded = PIDController((4.0,), PIDConfig(**gains, integral_max=10.0))
    unbounded = PIDController((4.0,), PIDConfig(**gains, integral_max=1e6))
    assert run(bounded, costs)[-1] == 0.0
    assert run(unbounded, costs)[-1] == 590.0


@given(costs=COSTS)
def test_derivative_of_a_cost_that_never_rises_is_nothing(costs: list[float]) -> None:
    falling = sorted(costs, reverse=True)
    controller = PIDController((3.0,), PIDConfig(kp=0.0, ki=0.0, kd=5.0, delay=3))
    assert run(controller, falling) == pytest.approx([0.0] * len(costs), abs=1e-5)


@given(first=COSTS, second=COSTS)
def test_budgets_steered_together_equal_budgets_steered_alone(
    first: list[float], second: list[float]
) -> None:
    config = PIDConfig(kp=0.2, ki=0.05, kd=0.1, delay=3)
    both = PIDController((2.0, 5.0), config)
    alone = PIDController((2.0,), config), PIDController((5.0,), config)
    for pair in zip(first, second, strict=False):
        together = both.update(torch.tensor(pair))
        apart = [float(c.update(torch.tensor([x]))[0]) for c, x in zip(alone, pair, strict=True)]
        assert together.tolist() == apart


def test_budget_without_a_step_keeps_its_multiplier_and_its_history() -> None:
    config = PIDConfig(kp=0.2, ki=0.05, kd=0.1, delay=2)
    gaps, dense = PIDController((2.0,), config), PIDController((2.0,), config)
    expected = run(dense, [3.0, 5.0, 6.0])
    found = run(gaps, [math.nan, 3.0, math.nan, 5.0, math.nan, 6.0])
    assert found == [0.0, expected[0], expected[0], expected[1], expected[1], expected[2]]


@given(costs=COSTS, at=st.integers(0, 30))
def test_controller_restored_goes_on_as_if_never_stopped(costs: list[float], at: int) -> None:
    config = PIDConfig(delay=4)
    whole, half, rest = (PIDController((3.0,), config) for _ in range(3))
    run(half, costs[:at])
    rest.load_state_dict(half.state_dict())
    assert run(whole, costs)[at:] == run(rest, costs[at:])


def test_controller_with_an_initial_multiplier_starts_there() -> None:
    controller = PIDController((2.0,), PIDConfig(ki=0.1, initial=0.7))
    assert controller.multipliers.tolist() == pytest.approx([0.7])
    assert run(controller, [2.0]) == pytest.approx([0.7])  # nothing is violated: it stays


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"kp": -0.1}, "kp"),
        ({"ki": math.nan}, "ki"),
        ({"kd": math.inf}, "kd"),
        ({"integral_max": -1.0}, "integral_max"),
        ({"delta_decay": 1.0}, "delta_decay"),
        ({"cost_decay": -0.5}, "cost_decay"),
        ({"delay": 0}, "delay"),
        ({"delay": 1.5}, "delay"),
        ({"initial": -0.1}, "initial"),
        ({"initial": 9.0, "ki": 0.1, "integral_max": 10.0}, "initial"),
    ],
)
def test_gain_out_of_range_is_refused_by_name(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        PIDConfig(**changes)
    assert caught.value.param == param


@pytest.mark.parametrize("costs", [[1.0], [1.0, math.inf]])
def test_costs_that_cannot_be_used_are_refused(costs: list[float]) -> None:
    with pytest.raises(InvalidRequestError, match="costs"):
        PIDController((2.0, 3.0), PIDConfig()).update(torch.tensor(costs))


@pytest.mark.parametrize("budgets", [(), (math.inf,), (2.0, math.nan)])
def test_budgets_that_cannot_be_used_are_refused(budgets: tuple[float, ...]) -> None:
    with pytest.raises(InvalidRequestError, match="budgets"):
        PIDController(budgets, PIDConfig())


def test_state_of_other_budgets_is_refused() -> None:
    state = PIDController((2.0, 3.0), PIDConfig()).state_dict()
    with pytest.raises(InvalidRequestError, match="does not fit"):
        PIDController((2.0,), PIDConfig()).load_state_dict(state)
