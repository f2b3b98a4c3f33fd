"""Generalised advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor

from ponderttt.errors import InvalidRequestError
from training.ppo.config import within


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    done: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of one rollout; for cost as for reward.

    Args:
        rewards: [T, N] float32.
        values: [T, N] float32, of the states acted in; detached.
        next_values: [T, N] float32, of the states reached, before any reset; 0 where the episode
            was over. Where it was only cut off, or the rollout ends, this is all that is known of
            what would have come.
        done: [T, N] bool, the episode ended with this step, over or cut off; sums stop there.
        gamma, gae_lambda: discount and trace decay, each in [0, 1].
    Returns:
        Advantages, not normalised, and returns (advantage + value), each [T, N].
    Raises:
        InvalidRequestError: shapes disagree, or a factor lies outside [0, 1].
    Source: Schulman et al., arXiv:1506.02438, equation 16.
    """
    within("gamma", gamma, 0.0, 1.0)
    within("gae_lambda", gae_lambda, 0.0, 1.0)
    for name, tensor in (("values", values), ("next_values", next_values), ("done", done)):
        if tensor.shape != rewards.shape:
            raise InvalidRequestError(
                name, f"has shape {list(tensor.shape)}; must be {list(rewards.shape)}, as rewards"
            )
    errors = rewards + gamma * next_values - values
    carry = gamma * gae_lambda * (~done).to(rewards.dtype)
    advantages = torch.empty_like(rewards)
    running = torch.zeros_like(rewards[0])
    for step in reversed(range(len(rewards))):
        running = errors[step] + carry[step] * running
        advantages[step] = running
    return advantages, advantages + values
