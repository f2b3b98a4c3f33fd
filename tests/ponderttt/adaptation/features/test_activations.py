"""Activation features against numbers worked by hand and a plain loop in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ponderttt.adaptation.features import FEATURE_GROUPS, extract
from ponderttt.adaptation.observation import ChunkObservation
from tests.ponderttt.adaptation.features.observations import (
    feature,
    make_observation,
    random_observation,
)


def observe(
    boundary: list[list[float]], final: list[list[float]] | None = None
) -> ChunkObservation:
    return make_observation(
        tokens=list(range(len(boundary))),
        boundary=torch.tensor(boundary),
        final=torch.tensor(boundary if final is None else final),
    )


def test_activation_spread_is_the_distance_of_outer_quantiles_of_log_rms() -> None:
    # log rms 0 … 10 in any order, so that the quantiles fall on 1 and 9
    obs = observe([[math.exp(i)] * 2 for i in (3, 0, 10, 1, 2, 9, 4, 8, 5, 7, 6)])
    assert feature(obs, "activation_spread") == pytest.approx(8.0, abs=1e-5)
    # between 0 and 1: quantiles 0.1 and 0.9
    assert feature(observe([[1.0], [math.e]]), "activation_spread") == pytest.approx(0.8)


def test_activation_offset_is_the_mean_over_rms_times_root_width() -> None:
    # mean / rms: 1 and 0, so 1/2 on average, times √4
    obs = observe([[1.0, 1.0, 1.0, 1.0], [3.0, -3.0, 3.0, -3.0]])
    assert feature(obs, "activation_offset") == pytest.approx(1.0)


def test_activation_sparsity_counts_what_is_small_beside_its_own_token() -> None:
    # rms 1/2: three of four below 0.05; rms 100: none below 10
    obs = observe([[1.0, 0.04, -0.04, 0.0], [100.0, -100.0, 100.0, 100.0]])
    assert feature(obs, "activation_sparsity") == pytest.approx(3 / 8)


def test_final_kurtosis_is_the_mean_log_ratio_of_moments() -> None:
    # [2, 0, 0, 0]: mean x⁴ = 4, mean x² = 1; all alike: ratio 1
    obs = observe([[1.0] * 4] * 2, final=[[2.0, 0.0, 0.0, 0.0], [5.0, -5.0, 5.0, -5.0]])
    assert feature(obs, "final_kurtosis") == pytest.approx(math.log(4) / 2, abs=1e-6)


def test_neighbour_cosine_averages_over_pairs() -> None:
    # 45° and 90°
    obs = observe([[1.0, 0.0], [5.0, 5.0], [-1.0, 1.0]])
    assert feature(obs, "neighbour_cosine") == pytest.approx(math.sqrt(0.5) / 2, abs=1e-6)


def test_refinement_is_one_less_the_cosine_with_the_final_state() -> None:
    # 90° and 180°: 1 and 2
    obs = observe([[1.0, 0.0], [1.0, 0.0]], final=[[0.0, 3.0], [-2.0, 0.0]])
    assert feature(obs, "refinement") == pytest.approx(1.5)


def reference(boundary: Tensor, final: Tensor) -> dict[str, float]:
    scale, offset, sparse, kurtosis, depth = [], [], [], [], []
    for x, y in zip(boundary.double(), final.double(), strict=True):
        rms = x.square().mean().sqrt()
        scale.append(rms.log())
        offset.append(x.mean() / rms * math.sqrt(x.numel()))
        sparse.append((x.abs() < 0.1 * rms).double().mean())
        kurtosis.append((y.pow(4).mean() / y.square().mean() ** 2).log())
        depth.append(1 - torch.cosine_similarity(x, y, dim=0))
    pairs = torch.cosine_similarity(boundary[1:].double(), boundary[:-1].double())
    levels = torch.stack(scale)
    means = {
        "activation_offset": offset,
        "activation_sparsity": sparse,
        "final_kurtosis": kurtosis,
        "refinement": depth,
    }
    return {
        "activation_spread": float(levels.quantile(0.9) - levels.quantile(0.1)),
        "neighbour_cosine": float(pairs.mean()),
        **{name: float(torch.stack(values).mean()) for name, values in means.items()},
    }


@pytest.mark.parametrize("count", [2, 64, 65, 129, 200])
def test_activations_read_in_blocks_equal_a_plain_loop(count: int) -> None:
    obs = random_observation(count, count=count)
    for name, expected in reference(obs.boundary, obs.final).items():
        assert feature(obs, name) == pytest.approx(expected, abs=2e-6), name


@pytest.mark.parametrize("factor", [1e-4, 1e9, 1e30])
def test_activations_when_all_are_scaled_stay_as_they_are(factor: float) -> None:
    obs = random_observation(3)
    scaled = replace(obs, boundary=obs.boundary * factor, final=obs.final * factor)
    for name in FEATURE_GROUPS["activations"]:
        assert feature(scaled, name) == pytest.approx(feature(obs, name), abs=2e-5), name


def test_activations_when_one_token_is_huge_hardly_change() -> None:
    obs = random_observation(4, count=128)
    massive = obs.boundary.clone()
    massive[0] *= 1e5
    for name in FEATURE_GROUPS["activations"]:
        changed = feature(replace(obs, boundary=massive), name)
        assert changed == pytest.approx(feature(obs, name), abs=0.02), name


def test_activations_when_all_are_zero_are_finite_and_flat() -> None:
    obs = observe([[0.0, 0.0], [0.0, 0.0]])
    assert extract(obs).isfinite().all()
    assert feature(obs, "neighbour_cosine") == 0.0
    assert feature(obs, "final_kurtosis") == 0.0
