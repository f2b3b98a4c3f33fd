"""Medians, quartiles and ratios of paired measurements."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ponderttt.bench.spread import Spread, ratio_spread, spread
from ponderttt.errors import InvalidRequestError

FIGURES = st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=20)


@given(FIGURES)
def test_spread_agrees_with_numpy(values: list[float]) -> None:
    found = spread(values)
    expected = np.quantile(values, [0.25, 0.5, 0.75])
    np.testing.assert_allclose([found.low, found.median, found.high], expected)


def test_spread_of_one_value_is_that_value() -> None:
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_spread_of_nothing_or_of_no_number_is_refused(values: list[float]) -> None:
    with pytest.raises(InvalidRequestError):
        spread(values)


def test_ratio_is_taken_round_by_round_so_that_drift_cancels() -> None:
    # The machine became ten times slower, for both sides alike.
    assert ratio_spread([2.0, 4.0, 0.2], [1.0, 2.0, 0.1]) == Spread(2.0, 2.0, 2.0)


@given(FIGURES, st.floats(0.1, 10.0))
def test_ratio_of_scaled_measurements_is_the_scale(values: list[float], scale: float) -> None:
    found = ratio_spread([value * scale for value in values], values)
    np.testing.assert_allclose([found.low, found.median, found.high], scale)


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_ratio_of_unpaired_or_to_nothing_is_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(InvalidRequestError):
        ratio_spread(ours, theirs)
