"""Intervals of paired differences."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap, ttest_1samp

from clients.bench.statistics import CONFIDENCE, RESAMPLES, cluster_by, paired_difference
from clients.bench.tables import show_difference


def test_interval_is_scipys_where_every_unit_is_a_cluster() -> None:
    values = np.random.default_rng(0).normal(1.0, 2.0, 40)
    found = paired_difference(values.tolist(), range(40), seed=5)
    expected = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="BCa", rng=np.random.default_rng(5)
    ).confidence_interval
    assert found is not None
    assert found.estimate == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_units_that_depend_on_each_other_widen_the_interval() -> None:
    means = np.random.default_rng(1).normal(0.0, 1.0, 24)
    values = np.repeat(means, 10).tolist()
    alone = paired_difference(values, range(240))
    grouped = paired_difference(values, [i // 10 for i in range(240)])
    assert alone is not None
    assert grouped is not None
    assert alone.estimate == pytest.approx(grouped.estimate)
    assert (alone.clusters, grouped.clusters) == (240, 24)
    widths = [float(each.high or 0) - float(each.low or 0) for each in (alone, grouped)]
    assert widths[1] > 2 * widths[0]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 3)), min_size=1, max_size=20),
)
def test_interval_holds_the_estimate_whatever_the_data(data: list[tuple[int, int]]) -> None:
    clusters, values = [c for c, _ in data], [float(v) for _, v in data]
    found = paired_difference(values, clusters)
    assert found is not None
    assert found.estimate == pytest.approx(sum(values) / len(values))
    if len(set(clusters)) == 1 or len(set(values)) == 1:
        assert found.method is None
    if found.method is None:
        assert (found.low, found.high) == (None, None)
    else:
        assert found.method == "t"
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.estimate < found.high


@pytest.mark.parametrize(
    ("sizes", "least"), [((24, 24, 24, 24), 0.935), ((6, 20, 45, 60), 0.9), ((30,) * 9, 0.935)]
)
def test_interval_over_few_clusters_covers_the_truth_as_often_as_it_says(
    sizes: tuple[int, ...], least: float
) -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    covered = 0
    for _ in range(1500):
        values = rng.normal(0.0, 1.0, len(sizes))[clusters] + rng.normal(0.0, 1.0, len(clusters))
        found = paired_difference(values.tolist(), clusters.tolist())
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.0 <= found.high
    assert least <= covered / 1500 <= 0.965


def test_few_clusters_alike_in_size_give_the_t_interval_of_their_means() -> None:
    means = np.array([0.2, -0.1, 0.5, 0.3])
    found = paired_difference(np.repeat(means, 7).tolist(), [i // 7 for i in range(28)])
    expected = ttest_1samp(means, 0.0).confidence_interval(CONFIDENCE)
    assert found is not None
    assert found.method == "t"
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("clusters", [3, 60])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_clusters_that_all_say_the_same_give_no_interval(clusters: int, value: float) -> None:
    found = paired_difference([value] * 2 * clusters, [i // 2 for i in range(2 * clusters)])
    assert found is not None
    assert (found.low, found.high, found.method) == (None, None, None)
    assert show_difference(found) == f"{value:+.3f} [–]"


def test_interval_says_how_it_was_made() -> None:
    few = paired_difference([1.0, 2.0, 3.0], range(3))
    many = paired_difference([1.0, 2.0, 3.0] * 10, range(30))
    assert show_difference(few).endswith("; t]")
    assert many is not None
    assert many.method == "bootstrap"
    assert "t" not in show_difference(many)


def test_no_unit_has_no_difference() -> None:
    assert paired_difference([], []) is None


@pytest.mark.parametrize(
    ("records", "by"),
    [
        ([{"repository": r, "file": "a"} for r in "abcd"], "repository"),
        ([{"repository": r, "file": f} for r in "abc" for f in "xy"], "file"),
        ([{"repository": "a", "file": "a"}] * 3, "unit"),
        ([{"task": "a"}, {"task": "b"}], "unit"),
        ([{"repository": "a", "file": "a"}, {"repository": "a"}], "unit"),
    ],
)
def test_clusters_are_the_largest_that_there_are_enough_of(
    records: list[dict[str, Any]], by: str
) -> None:
    assert cluster_by(records) == by


def test_resamples_of_many_clusters_are_not_all_held_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(0).normal(1.0, 2.0, 400).tolist()
    whole = paired_difference(values, range(400))
    monkeypatch.setattr("clients.bench.statistics._HELD", 40_000)
    tracemalloc.start()
    try:
        parts = paired_difference(values, range(400))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert parts == whole
    # All at once would be 9,999 × 400 indices alone, 32 MB.
    assert peak < 5_000_000
