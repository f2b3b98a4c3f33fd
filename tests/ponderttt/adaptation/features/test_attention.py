"""Attention features against numbers worked by hand and a plain loop in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ponderttt.adaptation.observation import ChunkObservation
from tests.ponderttt.adaptation.features.observations import (
    feature,
    make_observation,
    random_observation,
)


def observe(*heads: list[float]) -> ChunkObservation:
    """One probe at the last of the tokens."""
    return make_observation(
        tokens=list(range(len(heads[0]))), attention=torch.tensor(heads)[:, None]
    )


def test_attention_when_even_has_full_entropy_and_middling_reach() -> None:
    obs = observe([0.2] * 5)
    assert feature(obs, "attention_sink") == pytest.approx(0.2)
    assert feature(obs, "attention_entropy") == pytest.approx(1.0)
    # distances 3, 2, 1, 0 with weight 1/4 each
    expected = math.log(4 * 3 * 2 * 1) / 4 / math.log(4)
    assert feature(obs, "attention_reach") == pytest.approx(expected)


def test_attention_beside_the_sink_is_judged_by_its_shape_alone() -> None:
    for sink in (0.0, 0.5, 0.9):
        rest = (1 - sink) / 2
        obs = observe([sink, rest, 0.0, 0.0, rest])
        assert feature(obs, "attention_sink") == pytest.approx(sink)
        assert feature(obs, "attention_entropy") == pytest.approx(0.5, abs=1e-5)
        assert feature(obs, "attention_reach") == pytest.approx(0.5, abs=1e-5)


def test_attention_on_the_token_itself_has_no_entropy_and_no_reach() -> None:
    obs = observe([0.0, 0.0, 0.0, 0.0, 1.0])
    assert feature(obs, "attention_entropy") == pytest.approx(0.0, abs=1e-6)
    assert feature(obs, "attention_reach") == pytest.approx(0.0, abs=1e-6)


def test_attention_all_on_the_sink_has_no_shape() -> None:
    obs = observe([1.0, 0.0, 0.0, 0.0, 0.0])
    assert feature(obs, "attention_sink") == 1.0
    assert feature(obs, "attention_entropy") == 0.0
    assert feature(obs, "attention_reach") == 0.0


def test_head_disagreement_is_the_spread_of_entropies_over_heads() -> None:
    even, single = [0.0, 0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0, 0.0]
    # entropies 1 and 0: σ = 1/2; 1, 0, 0, 0: σ = √3 / 4
    assert feature(observe(even, single), "head_disagreement") == pytest.approx(0.5)
    four = observe(even, single, single, single)
    assert feature(four, "head_disagreement") == pytest.approx(math.sqrt(3) / 4)
    assert feature(observe(even, even), "head_disagreement") == pytest.approx(0.0, abs=1e-6)


def reference(attention: Tensor, queries: list[int]) -> dict[str, float]:
    heads, count, _ = attention.shape
    entropy = torch.zeros(heads, count, dtype=torch.float64)
    reach = torch.zeros_like(entropy)
    for h in range(heads):
        for p, q in enumerate(queries):
            b = attention[h, p, 1 : q + 1].double()
            if q < 2:
                continue
            b = b / b.sum()
            entropy[h, p] = torch.special.entr(b).sum() / math.log(q)
            distance = torch.tensor([q - s for s in range(1, q + 1)], dtype=torch.float64)
            reach[h, p] = (b * distance.log1p()).sum() / math.log(q)
    return {
        "attention_entropy": float(entropy.mean()),
        "attention_reach": float(reach.mean()),
        "attention_sink": float(attention[:, :, 0].mean()),
        "head_disagreement": float(entropy.std(dim=0, correction=0).mean()),
    }


@pytest.mark.parametrize(("count", "start", "heads"), [(2, 0, 1), (40, 0, 4), (96, 300, 9)])
def test_attention_features_equal_a_plain_loop(count: int, start: int, heads: int) -> None:
    obs = random_observation(5, count=count, start=start, heads=heads)
    queries = (obs.probe_positions + start).tolist()
    for name, expected in reference(obs.attention, queries).items():
        assert feature(obs, name) == pytest.approx(expected, abs=1e-5), name
