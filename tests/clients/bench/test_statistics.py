"""Intervals of paired differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from clients.bench.statistics import RESAMPLES, cluster_by, paired_difference


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
    means = np.random.default_rng(1).normal(0.0, 1.0, 12)
    values = np.repeat(means, 20).tolist()
    alone = paired_difference(values, range(240))
    grouped = paired_difference(values, [i // 20 for i in range(240)])
    assert alone is not None
    assert grouped is not None
    assert alone.estimate == pytest.approx(grouped.estimate)
    assert (alone.clusters, grouped.clusters) == (240, 12)
    widths = [float(each.high or 0) - float(each.low or 0) for each in (alone, grouped)]
    assert widths[1] > 3 * widths[0]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 3)), min_size=1, max_size=20),
)
def test_interval_holds_the_estimate_whatever_the_data(data: list[tuple[int, int]]) -> None:
    clusters, values = [c for c, _ in data], [float(v) for _, v in data]
    found = paired_difference(values, clusters)
    assert found is not None
    assert found.estimate == pytest.approx(sum(values) / len(values))
    if len(set(clusters)) == 1:
        assert (found.low, found.high) == (None, None)
    else:
        assert found.low is not None
        assert found.high is not None
        # BCa may move both ends to the resamples' extremes, which lie within the data.
        assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9


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
