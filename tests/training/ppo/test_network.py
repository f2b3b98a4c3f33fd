"""The actor-critic: what is shipped of it, its mask, its normaliser and its value heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ponderttt.adaptation.policy import PolicyGate, PolicyMetadata
from ponderttt.errors import InvalidRequestError
from training.ppo.categorical import entropy, log_prob_of, masked_log_probs, sample
from training.ppo.network import NUM_ACTIONS, NUM_FEATURES, ActorCritic, ValueHead
from training.ppo.normaliser import FeatureNormaliser


def features(rows: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, NUM_FEATURES, generator=generator) * scale + 2.0


def every(rows: int) -> Tensor:
    return torch.ones(rows, NUM_ACTIONS, dtype=torch.bool)


# --- masks ----------------------------------------------------------------------------------------


@given(
    logits=st.lists(st.floats(-50, 50), min_size=4, max_size=4),
    allowed=st.lists(st.booleans(), min_size=4, max_size=4).filter(any),
)
def test_distribution_under_a_mask_equals_that_of_the_allowed_alone(
    logits: list[float], allowed: list[bool]
) -> None:
    values, mask = torch.tensor(logits), torch.tensor(allowed)
    found = masked_log_probs(values, mask)
    reference = torch.distributions.Categorical(logits=values[mask])
    torch.testing.assert_close(found[mask].exp(), reference.probs)
    assert (found[~mask] == -torch.inf).all()
    torch.testing.assert_close(entropy(found), reference.entropy(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mask", [[1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]])
def test_gradients_under_a_mask_are_finite_and_nothing_where_not_allowed(mask: list[int]) -> None:
    logits = torch.tensor([[1.0, 30.0, -2.0, 0.5]], requires_grad=True)
    allowed = torch.tensor([mask], dtype=torch.bool)
    log_probs = masked_log_probs(logits, allowed)
    (entropy(log_probs) + log_prob_of(log_probs, torch.tensor([0]))).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[~allowed] == 0).all()


def test_samples_are_allowed_and_as_frequent_as_probable() -> None:
    logits = torch.tensor([0.0, 5.0, 1.0, -1.0]).expand(20_000, -1)
    allowed = torch.tensor([True, False, True, True]).expand(20_000, -1)
    log_probs = masked_log_probs(logits, allowed)
    drawn = sample(log_probs, torch.Generator().manual_seed(1))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert shares[1] == 0
    torch.testing.assert_close(shares, log_probs[0].exp(), atol=0.015, rtol=0)


# --- the normaliser -------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6), offset=st.floats(-1e4, 1e4))
def test_normaliser_fed_in_batches_equals_mean_and_deviation_of_all(
    sizes: list[int], offset: float
) -> None:
    rows = features(sum(sizes)) + offset
    normaliser = FeatureNormaliser(NUM_FEATURES)
    for part in rows.split(sizes):
        normaliser.update(part)
    expected = np.asarray(rows, dtype=np.float64)
    np.testing.assert_allclose(normaliser.feature_mean, expected.mean(0), rtol=1e-5, atol=1e-5)
    if len(rows) > 1:
        np.testing.assert_allclose(normaliser.feature_std, expected.std(0), rtol=1e-4)


def test_normaliser_of_a_constant_feature_divides_by_one() -> None:
    normaliser = FeatureNormaliser(NUM_FEATURES)
    rows = features(10)
    rows[:, 5] = 0.1
    for part in rows.split(3):
        normaliser.update(part)
    assert normaliser.feature_std[5] == 1.0
    assert (normaliser(rows)[:, 5].abs() < 1e-6).all()


def test_normaliser_when_frozen_keeps_its_values_and_stays_so_when_restored() -> None:
    normaliser = FeatureNormaliser(NUM_FEATURES)
    normaliser.update(features(10))
    normaliser.freeze()
    restored = FeatureNormaliser(NUM_FEATURES)
    restored.load_state_dict(normaliser.state_dict())
    restored.update(features(10, seed=5))
    assert restored.feature_mean == normaliser.feature_mean
    assert restored.feature_std == normaliser.feature_std


def test_normaliser_given_values_goes_on_as_if_it_had_seen_them() -> None:
    seen, rest = features(40), features(25, seed=2)
    mean, std = seen.double().mean(0).tolist(), seen.double().std(0, correction=0).tolist()
    given_values = FeatureNormaliser(NUM_FEATURES, mean, std, count=40)
    given_values.update(rest)
    both = FeatureNormaliser(NUM_FEATURES)
    both.update(torch.cat((seen, rest)))
    np.testing.assert_allclose(given_values.feature_mean, both.feature_mean, rtol=1e-5)
    np.testing.assert_allclose(given_values.feature_std, both.feature_std, rtol=1e-5)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([0.0] * 31, [1.0] * 32),
        ([0.0] * 32, [0.0] * 32),
        ([float("nan")] * 32, [1.0] * 32),
        ([0.0] * 32, None),
    ],
)
def test_normaliser_given_unusable_values_refuses_them(
    mean: list[float], std: list[float] | None
) -> None:
    with pytest.raises(InvalidRequestError, match="feature_"):
        FeatureNormaliser(NUM_FEATURES, mean, std)


# --- the network ----------------------------------------------------------------------------------


def test_network_gives_the_same_logits_as_the_gate_it_ships_as() -> None:
    network = ActorCritic((16, 8), seed=3)
    network.normaliser.update(features(100))
    rows = features(20, seed=4, scale=60.0)  # far enough out to be clamped
    log_probs = network(rows, every(20)).log_probs
    metadata = PolicyMetadata(
        base_model="toy",
        chunk_size=64,
        cost_model="nominal",
        budgets=(2.0,),
        feature_mean=network.normaliser.feature_mean,
        feature_std=network.normaliser.feature_std,
        hidden_sizes=(16, 8),
    )
    served = PolicyGate(network.policy, metadata).logits(rows)
    assert torch.equal(torch.log_softmax(served, -1), log_probs.detach())


def test_network_made_and_used_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    network = ActorCritic((16,), seed=3)
    network(features(4), every(4))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_network_of_a_seed_is_its_own_and_starts_undecided() -> None:
    first, same, other = (ActorCritic((16,), seed=seed) for seed in (1, 1, 2))
    state = first.state_dict()
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in state.items())
    assert not torch.equal(first.policy.actor.weight, other.policy.actor.weight)
    first.normaliser.update(features(100))
    probabilities = first(features(50), every(50)).log_probs.exp()
    torch.testing.assert_close(probabilities, torch.full((50, 4), 0.25), atol=0.03, rtol=0)


def test_value_head_whose_scale_moves_keeps_its_output() -> None:
    head = ValueHead(6)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(9, 6, generator=torch.Generator().manual_seed(2))
    head.absorb(torch.tensor([3.0, 9.0]))
    before = head(hidden)
    head.absorb(torch.tensor([300.0, -900.0]))
    assert float(head.std) > 50
    torch.testing.assert_close(head(hidden), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.scale(head(hidden)), head.scaled(hidden), rtol=1e-4, atol=1e-4)


def test_value_head_of_equal_returns_gives_them_and_stays_finite() -> None:
    head = ValueHead(6)
    head.absorb(torch.full((5,), 7.0))
    head.absorb(torch.full((5,), 7.0))
    torch.testing.assert_close(head(torch.zeros(2, 6)), torch.full((2,), 7.0))
