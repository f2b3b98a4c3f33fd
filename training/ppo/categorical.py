"""Distributions over actions of which some are not allowed."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_log_probs(logits: Tensor, allowed: Tensor) -> Tensor:
    """Log-probabilities with -inf where not allowed.

    Args:
        logits: [..., A] float32.
        allowed: [..., A] bool, at least one per row.
    """
    return torch.log_softmax(logits.masked_fill(~allowed, -torch.inf), -1)


def entropy(log_probs: Tensor) -> Tensor:
    """Nats, [...]: of the allowed actions' distribution; 0 where only one is allowed.

    Args:
        log_probs: [..., A], -inf where not allowed.
    """
    # 0 · -inf is NaN, and so is its gradient.
    finite = log_probs.masked_fill(log_probs.isinf(), 0.0)
    return -(log_probs.exp() * finite).sum(-1)


def log_prob_of(log_probs: Tensor, actions: Tensor) -> Tensor:
    """[...]: the log-probability of one action ([...] int64) per row."""
    return log_probs.gather(-1, actions[..., None])[..., 0]


def sample(log_probs: Tensor, generator: torch.Generator) -> Tensor:
    """[B] int64: one action per row of [B, A]; never one that is not allowed."""
    return torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]
