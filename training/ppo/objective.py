"""The pieces of the objective: advantages with the multiplier in them, the clipped loss, the KL."""

from __future__ import annotations

import torch
from torch import Tensor


def constrained_advantages(
    reward_advantages: Tensor, cost_advantages: Tensor, multipliers: Tensor, budget_index: Tensor
) -> Tensor:
    """(A_r - λ·A_c) / (1 + |λ|) with the λ of each row's budget.

    Args:
        reward_advantages, cost_advantages: [...] float32.
        multipliers: [K] float32.
        budget_index: [...] int64.
    Source: Stooke et al., arXiv:2007.03964, equation 9 and below; |λ| because λ may be negative
        where budgets are to be used up.
    """
    row = multipliers[budget_index]
    return (reward_advantages - row * cost_advantages) / (1.0 + row.abs())


def normalise_by_budget(advantages: Tensor, budget_index: Tensor, num_budgets: int) -> Tensor:
    """Zero mean and unit deviation over the rows of each budget.

    Over the whole rollout, so that a row weighs the same in every epoch whatever minibatch it falls
    into; after reward and cost are combined, so that λ keeps its meaning; and per budget, because
    budgets with a large and a small λ have advantages of different size, and the small ones would
    not be learned.

    Args:
        advantages: [...] float32.
        budget_index: [...] int64.
        num_budgets: K.
    Returns:
        [...]; 0 for a row that is alone under its budget.
    """
    result = torch.zeros_like(advantages)
    for index in range(num_budgets):
        rows = budget_index == index
        if rows.any():
            mine = advantages[rows]
            result[rows] = (mine - mine.mean()) / (mine.std(correction=0) + 1e-8)
    return result


def clipped_loss(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate, negated: its mean over [B] (arXiv:1707.06347, equation 7)."""
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """KL(old ‖ new) from samples of old: mean of (r - 1) - log r, never negative ("k3").

    Args:
        log_ratio: [B], log new - log old probability of the actions taken.
    Source: Schulman, "Approximating KL Divergence", joschu.net/blog/kl-approx.html, 2020.
    """
    return (torch.expm1(log_ratio) - log_ratio).mean()


def explained_variance(values: Tensor, returns: Tensor) -> float | None:
    """1 - Var(returns - values) / Var(returns); None where all returns are equal."""
    variance = float(returns.var(correction=0))
    if variance == 0.0:
        return None
    return 1.0 - float((returns - values).var(correction=0)) / variance
