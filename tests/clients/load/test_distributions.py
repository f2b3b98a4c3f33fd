"""Distributions of lengths and times."""

from __future__ import annotations

import random
import statistics

import numpy as np
import pytest

from clients.load.distributions import parse_distribution
from clients.load.summary import spread
from ponderttt.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("text", "low", "median", "high"),
    [
        ("64", 64, 64, 64),
        ("constant:8", 8, 8, 8),
        ("uniform:32:256", 32, 144, 256),
        ("lognormal:128:0.6", 0, 128, 1412),
        ("lognormal:128:0.6:512", 0, 128, 512),
    ],
)
def test_draws_have_the_named_bounds_and_median(
    text: str, low: float, median: float, high: float
) -> None:
    made = parse_distribution(text, "--x", 0, 1e6)
    generator = random.Random(0)
    draws = [made.draw(generator) for _ in range(4000)]
    assert low <= min(draws)
    assert max(draws) <= high
    assert statistics.median(draws) == pytest.approx(median, rel=0.05)
    if text.startswith("lognormal"):
        assert statistics.stdev(np.log(draws)) == pytest.approx(0.6, rel=0.05)
    again = parse_distribution(str(made), "--x", 0, 1e6)
    assert [again.draw(random.Random(1))] == [made.draw(random.Random(1))]


@pytest.mark.parametrize(
    "text", ["", "x", "uniform:1", "uniform:2:1", "lognormal:1:-1", "normal:1:2", "inf", "-1", "::"]
)
def test_other_forms_and_values_out_of_bounds_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="give VALUE"):
        parse_distribution(text, "--x", 0, 1e6)


def test_spread_is_of_the_values_that_there_are() -> None:
    records = [{"x": float(value)} for value in range(101)] + [{"x": None}]
    assert spread(records, "x") == {"mean": 50.0, "p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100}
    assert spread(records[-1:], "x") is None
