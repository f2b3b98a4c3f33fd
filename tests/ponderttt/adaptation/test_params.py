"""What a caller may ask of test-time training, and how mistakes are refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import MAX_BUDGET, MAX_CHUNK, MIN_BUDGET, MIN_CHUNK, TTTParams
from ponderttt.errors import InvalidRequestError

BAD: list[tuple[str, Any, str]] = [
    ("gate", "treshold", "'treshold' is not one of policy, threshold, random, fixed, off"),
    ("gate", "", "is not one of"),
    ("gate", 1, "is not one of"),
    ("cost_model", "seconds", "nominal, measured"),
    ("adapt_on", "all", "prompt, generated, both"),
    ("when", "later", "inline, background"),
    ("action", "UPDATE_1", "SKIP, UPDATE_1, UPDATE_2, UPDATE_4"),
    ("action", 1, "SKIP, UPDATE_1, UPDATE_2, UPDATE_4"),
    ("action", 7, "SKIP, UPDATE_1, UPDATE_2, UPDATE_4"),
    ("budget", -1.0, "outside [1, 12]"),
    ("budget", 0.999, "outside [1, 12]"),
    ("budget", 12.001, "outside [1, 12]"),
    ("budget", math.nan, "finite"),
    ("budget", math.inf, "finite"),
    ("budget", "2", "finite"),
    ("budget", True, "finite"),
    ("chunk_size", 15, "outside [16, 2048]"),
    ("chunk_size", 2049, "outside [16, 2048]"),
    ("chunk_size", -256, "outside [16, 2048]"),
    ("chunk_size", math.nan, "whole number"),
    ("chunk_size", 64.5, "whole number"),
    ("chunk_size", True, "whole number"),
    ("chunk_size", "256", "whole number"),
    ("seed", 0.5, "whole number"),
    ("seed", math.nan, "whole number"),
]


@pytest.mark.parametrize(("field", "value", "says"), BAD)
def test_params_with_a_bad_value_name_the_field_and_the_limit(
    field: str, value: Any, says: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        TTTParams(**{field: value})
    assert caught.value.param == f"ttt.{field}"
    assert says in str(caught.value)


@pytest.mark.parametrize("budget", [1, 1.0, 2.5, 12, 12.0])
@pytest.mark.parametrize("chunk_size", [16, 256, 2048])
def test_params_at_the_limits_are_taken(budget: float, chunk_size: int) -> None:
    params = TTTParams(budget=budget, chunk_size=chunk_size)
    assert (params.budget, params.chunk_size) == (budget, chunk_size)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_params_with_any_budget_take_it_exactly_where_it_is_in_range(budget: float) -> None:
    if MIN_BUDGET <= budget <= MAX_BUDGET:
        assert TTTParams(budget=budget).budget == budget
    else:
        with pytest.raises(InvalidRequestError, match=r"ttt\.budget"):
            TTTParams(budget=budget)


@given(st.integers())
def test_params_with_any_chunk_size_take_it_exactly_where_it_is_in_range(size: int) -> None:
    if MIN_CHUNK <= size <= MAX_CHUNK:
        assert TTTParams(chunk_size=size).chunk_size == size
    else:
        with pytest.raises(InvalidRequestError, match=r"ttt\.chunk_size"):
            TTTParams(chunk_size=size)


def test_params_with_nothing_given_leave_everything_open() -> None:
    assert set(dataclasses.astuple(TTTParams())) == {None}


@pytest.mark.parametrize("gate", ["threshold", "random", "policy", "off"])
def test_params_with_an_action_for_a_gate_that_takes_none_are_refused(gate: Any) -> None:
    with pytest.raises(InvalidRequestError, match="only gate 'fixed' takes an action") as caught:
        TTTParams(gate=gate, action=Action.UPDATE_2)
    assert caught.value.param == "ttt.action"


@pytest.mark.parametrize("gate", ["fixed", None])
def test_params_with_an_action_for_gate_fixed_are_taken(gate: Any) -> None:
    assert TTTParams(gate=gate, action=Action.UPDATE_4).action is Action.UPDATE_4


def test_params_for_the_background_without_a_session_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"name one in ttt\.session") as caught:
        TTTParams(when="background")
    assert caught.value.param == "ttt.when"
    assert TTTParams(session="s", when="background").when == "background"


def test_params_once_made_cannot_be_changed() -> None:
    params = TTTParams(budget=2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.budget = 99.0  # type: ignore[misc]
