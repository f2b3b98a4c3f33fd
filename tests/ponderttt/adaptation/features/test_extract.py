"""The vector as a whole: names, order, finiteness, and independence of everything else."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from ponderttt.adaptation.features import (
    FEATURE_GROUPS,
    FEATURE_NAMES,
    FEATURE_VERSION,
    extract,
)
from ponderttt.adaptation.observation import ChunkObservation, History
from ponderttt.errors import InvalidRequestError, ModelError
from tests.ponderttt.adaptation.features.observations import (
    TEXTS,
    make_observation,
    observations,
    random_observation,
)

# log of the largest float32 is 89, and of the largest loss drawn 69.
LARGEST_FEATURE = 100.0

VERSION_1 = """
mean_loss loss_trend mean_entropy overconfidence
activation_spread activation_offset activation_sparsity final_kurtosis neighbour_cosine refinement
attention_entropy attention_reach attention_sink head_disagreement
identifier_diversity keyword_share punctuation_share comment_share
indentation bracket_depth line_variation compressed_share
loss_ema cost_ema allowance remaining
position length type_token_ratio copy_accuracy rarity recency
"""


def tensors(obs: ChunkObservation) -> dict[str, Tensor]:
    values = {field.name: getattr(obs, field.name) for field in fields(obs)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def test_names_in_version_1_are_these_32_in_this_order() -> None:
    assert FEATURE_VERSION == 2
    assert tuple(VERSION_1.split()) == FEATURE_NAMES
    assert len(set(FEATURE_NAMES)) == 32


def test_groups_hold_as_many_features_as_the_design_says() -> None:
    sizes = {group: len(names) for group, names in FEATURE_GROUPS.items()}
    assert sizes == {
        "confidence": 4,
        "activations": 6,
        "attention": 4,
        "code": 8,
        "history": 4,
        "sequence": 6,
    }
    assert sum(FEATURE_GROUPS.values(), ()) == FEATURE_NAMES


@settings(derandomize=True, deadline=None, max_examples=300)
@given(obs=observations())
def test_extract_on_any_chunk_is_finite_bounded_and_repeatable(obs: ChunkObservation) -> None:
    before = {name: value.clone() for name, value in tensors(obs).items()}
    vector = extract(obs)
    assert vector.shape == (32,)
    assert vector.dtype == torch.float32
    assert vector.device.type == "cpu"
    assert vector.isfinite().all()
    assert vector.abs().max() < LARGEST_FEATURE
    assert torch.equal(extract(obs), vector)
    for name, value in tensors(obs).items():
        assert torch.equal(value, before[name])


def test_extract_when_order_and_random_state_change_gives_the_same_vectors() -> None:
    chunks = [
        random_observation(seed, count=20 + 7 * seed, start=13 * seed, text=TEXTS[seed])
        for seed in range(8)
    ]
    expected = [extract(chunk) for chunk in chunks]
    torch.manual_seed(7)
    for order in (range(7, -1, -1), (3, 3, 0, 7, 1, 0, 5)):
        for index in order:
            assert torch.equal(extract(chunks[index]), expected[index])


def test_extract_when_tensors_are_strided_views_gives_the_same_vector() -> None:
    obs = random_observation(1)
    strided: dict[str, Any] = {
        name: torch.stack((value, torch.full_like(value, 5)), dim=-1)[..., 0]
        for name, value in tensors(obs).items()
    }
    assert not strided["attention"].is_contiguous()
    torch.testing.assert_close(extract(replace(obs, **strided)), extract(obs))


def test_extract_when_tensors_carry_gradients_gives_the_same_plain_vector() -> None:
    obs = random_observation(2)
    tracked = replace(obs, boundary=obs.boundary.clone().requires_grad_())
    vector = extract(tracked)
    assert torch.equal(vector, extract(obs))
    assert not vector.requires_grad


@pytest.mark.parametrize(
    ("field", "spoilt"),
    [
        ("boundary", {"activation_spread", "activation_offset", "neighbour_cosine", "refinement"}),
        ("final", {"final_kurtosis", "refinement"}),
        ("losses", {"mean_loss", "loss_trend", "overconfidence"}),
        ("probe_entropy", {"mean_entropy"}),
        ("attention", {"attention_sink"}),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_extract_when_the_model_is_not_finite_names_the_features(
    field: str, spoilt: set[str], value: float
) -> None:
    obs = make_observation()
    spoiling: dict[str, Any] = {field: torch.full_like(getattr(obs, field), value)}
    broken = replace(obs, **spoiling)
    if (field, value) == ("losses", float("inf")):
        spoilt = spoilt - {"overconfidence"}  # exp(-inf) is a fair 0
    with pytest.raises(ModelError, match="not finite") as caught:
        extract(broken)
    assert all(name in str(caught.value) for name in spoilt)


def test_extract_when_the_history_is_not_finite_is_refused() -> None:
    for history in (History(loss_ema=float("nan")), History(credit=float("nan"))):
        with pytest.raises(ModelError, match=r"loss_ema|allowance"):
            extract(make_observation(history=history))


def test_extract_on_an_empty_chunk_is_refused() -> None:
    obs = make_observation()
    with pytest.raises(InvalidRequestError, match="at least one") as caught:
        extract(replace(obs, token_ids=obs.token_ids[:0]))
    assert caught.value.param == "token_ids"
