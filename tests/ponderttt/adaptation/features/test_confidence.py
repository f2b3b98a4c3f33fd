"""Confidence features against numbers worked by hand."""

from __future__ import annotations

import math

import pytest

from tests.ponderttt.adaptation.features.observations import feature, make_observation


def test_mean_loss_is_the_log_of_one_plus_the_mean() -> None:
    obs = make_observation(losses=[0.0, 1.0, 2.0, 5.0])
    assert feature(obs, "mean_loss") == pytest.approx(math.log(3))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.0, 3.0], math.log(4 / 2)),
        ([3.0, 1.0], -math.log(4 / 2)),
        ([2.0, 0.0, 1.0], math.log(1.5 / 3)),  # the middle one is in the second half
        ([4.0, 0.0, 3.0, 1.0], 0.0),
        ([7.0], 0.0),
    ],
)
def test_loss_trend_compares_the_halves(losses: list[float], expected: float) -> None:
    obs = make_observation(losses=losses)
    assert feature(obs, "loss_trend") == pytest.approx(expected, abs=1e-7)


def test_mean_entropy_when_every_token_is_as_likely_is_one() -> None:
    uniform = make_observation(probes=[0, 3], entropy=[math.log(64)] * 2, vocab_size=64)
    assert feature(uniform, "mean_entropy") == pytest.approx(1.0)
    half = make_observation(probes=[0, 3], entropy=[0.0, math.log(64)], vocab_size=64)
    assert feature(half, "mean_entropy") == pytest.approx(0.5)


def test_overconfidence_is_top1_less_the_probability_of_what_came() -> None:
    # exp(-loss): 1/2 and 1/4, mean 3/8; top-1: mean 3/4
    obs = make_observation(
        losses=[math.log(2), math.log(4)], probes=[1, 2], entropy=[1.0, 1.0], top1=[0.5, 1.0]
    )
    assert feature(obs, "overconfidence") == pytest.approx(3 / 8)


@pytest.mark.parametrize("name", ["mean_loss", "loss_trend", "mean_entropy", "overconfidence"])
def test_confidence_of_a_lone_first_token_is_zero(name: str) -> None:
    obs = make_observation(tokens=[7], losses=[], probes=[])
    assert feature(obs, name) == 0.0
