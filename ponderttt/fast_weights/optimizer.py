"""The optimiser of the fast weights, vectorised over owners."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_rows(gradients: Tensor, max_norm: float) -> Tensor:
    """Clip each row of [N, P] to the norm `max_norm`, as torch's `clip_grad_norm_` does."""
    norms = gradients.norm(dim=1, keepdim=True)
    return gradients * (max_norm / (norms + 1e-6)).clamp(max=1.0)


def adam_rows(
    weights: Tensor,
    gradients: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
    learning_rates: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One Adam step of each row, with bias correction (Kingma & Ba, arXiv:1412.6980).

    Args:
        weights, gradients, first, second: [N, P].
        steps: [N], the number of this step, counted from 1.
        learning_rates: [N].
        betas, eps: decay of the moments, and the term that avoids division by zero.
    Returns:
        New weights, first and second moments; the arguments are left as they are.
    """
    first = torch.lerp(first, gradients, 1 - betas[0])
    second = second * betas[1] + gradients * gradients * (1 - betas[1])
    steps = steps.to(torch.float64)[:, None]
    step_size = (learning_rates.to(torch.float64)[:, None] / (1 - betas[0] ** steps)).to(
        weights.dtype
    )
    correction = (1 - betas[1] ** steps).sqrt().to(weights.dtype)
    return weights - step_size * first / (second.sqrt() / correction + eps), first, second


def sgd_rows(
    weights: Tensor, gradients: Tensor, first: Tensor, learning_rates: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """One step of each row by gradient descent with heavy-ball momentum, as `torch.optim.SGD`.

    Args:
        weights, gradients, first: [N, P]; `first` is the momentum, zero before the first step.
        learning_rates: [N].
        momentum: share of the momentum that is kept.
    Returns:
        New weights and momentum; the arguments are left as they are.
    """
    first = momentum * first + gradients
    return weights - learning_rates[:, None] * first, first


def decay_rows(weights: Tensor, fresh: Tensor, decay: float) -> Tensor:
    """Take back the share `decay` of each row's distance from fresh weights: [N, P], [P]."""
    return weights - decay * (weights - fresh)


def project_rows(weights: Tensor, fresh: Tensor, radius: float) -> Tensor:
    """Each row of [N, P], or where it lies outside, the nearest point of the ball around [P].

    Rows inside are left bit for bit.
    """
    offsets = weights - fresh
    norms = offsets.norm(dim=1, keepdim=True)
    return torch.where(norms > radius, fresh + offsets * (radius / norms), weights)
