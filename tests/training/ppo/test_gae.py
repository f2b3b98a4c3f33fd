"""Advantages: against sums written out, and against the definition's limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ponderttt.errors import InvalidRequestError
from training.ppo.gae import gae


def naive(
    rewards: Tensor, values: Tensor, following: Tensor, done: Tensor, gamma: float, decay: float
) -> Tensor:
    """The sum of discounted errors from every step on, up to the end of its episode."""
    result = torch.zeros_like(rewards)
    for env in range(rewards.shape[1]):
        for start in range(len(rewards)):
            for step in range(start, len(rewards)):
                error = rewards[step, env] + gamma * following[step, env] - values[step, env]
                result[start, env] += (gamma * decay) ** (step - start) * error
                if done[step, env]:
                    break
    return result


@given(
    seed=st.integers(0, 10_000),
    steps=st.integers(1, 9),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    decay=st.sampled_from([0.0, 0.7, 1.0]),
)
def test_gae_of_any_rollout_equals_the_sums_written_out(
    seed: int, steps: int, gamma: float, decay: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, values, following = torch.randn(3, steps, 3, generator=generator).double() + 1.0
    done = torch.rand(steps, 3, generator=generator) < 0.3
    advantages, returns = gae(rewards, values, following, done, gamma, decay)
    expected = naive(rewards, values, following, done, gamma, decay)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + values)


def test_gae_across_the_end_of_an_episode_takes_nothing_from_the_next() -> None:
    zeros = torch.zeros(3, 1)
    done = torch.tensor([[False], [True], [False]])
    rewards = torch.tensor([[1.0], [2.0], [100.0]])
    advantages, _ = gae(rewards, zeros, zeros, done, 1.0, 1.0)
    assert advantages.tolist() == [[3.0], [2.0], [100.0]]


def test_gae_of_an_episode_cut_off_counts_what_was_expected_of_it() -> None:
    zeros, done = torch.zeros(1, 2), torch.tensor([[True, True]])
    following = torch.tensor([[10.0, 0.0]])  # cut off, and over
    advantages, _ = gae(torch.ones(1, 2), zeros, following, done, 0.5, 0.9)
    assert advantages.tolist() == [[6.0, 1.0]]


@pytest.mark.parametrize(("gamma", "decay"), [(1.1, 0.5), (-0.1, 0.5), (0.5, 2.0)])
def test_gae_with_a_factor_out_of_range_is_refused(gamma: float, decay: float) -> None:
    zeros = torch.zeros(2, 2)
    with pytest.raises(InvalidRequestError, match="outside"):
        gae(zeros, zeros, zeros, zeros.bool(), gamma, decay)


def test_gae_of_shapes_that_disagree_names_the_wrong_one() -> None:
    zeros = torch.zeros(2, 2)
    with pytest.raises(InvalidRequestError, match="next_values"):
        gae(zeros, zeros, torch.zeros(2, 3), zeros.bool(), 0.9, 0.9)
