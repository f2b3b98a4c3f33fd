"""Next-token cross-entropy in slices of rows, so that [T, vocabulary] never exists at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Rows per slice: 128 rows of a vocabulary of 150,000 are 78 MB in float32.
SLICE_ROWS = 128


def logit_slices(normed: Tensor, head: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, float32 logits of these rows) for [N, hidden] @ [V, hidden]ᵀ, slice by slice."""
    for begin in range(0, normed.shape[0], SLICE_ROWS):
        rows = slice(begin, min(begin + SLICE_ROWS, normed.shape[0]))
        yield rows, F.linear(normed[rows], head).float()


def token_losses(normed: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each row: [N, hidden], [V, hidden], [N] → [N] float32."""
    losses = torch.empty(normed.shape[0], device=normed.device)
    for rows, logits in logit_slices(normed, head):
        picked = logits.gather(1, targets[rows, None]).squeeze(1)
        losses[rows] = logits.logsumexp(dim=1) - picked
    return losses


class _WeightedLoss(torch.autograd.Function):
    """Sum of weighted cross-entropies; the gradient is made in the forward, slice by slice."""

    @staticmethod
    def forward(
        ctx: Any, normed: Tensor, head: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(normed.shape[0], device=normed.device)
        gradient = torch.empty_like(normed)
        for rows, logits in logit_slices(normed, head):
            log_norm = logits.logsumexp(dim=1, keepdim=True)
            losses[rows] = (log_norm - logits.gather(1, targets[rows, None])).squeeze(1)
            probabilities = logits.sub_(log_norm).exp_()
            probabilities.scatter_add_(1, targets[rows, None], torch.full_like(log_norm, -1.0))
            probabilities.mul_(weights[rows, None])
            gradient[rows] = probabilities.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None


def weighted_loss(
    normed: Tensor, head: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ weights · cross-entropy, differentiable in `normed` only.

    Args:
        normed: [N, hidden] after the final norm.
        head: [V, hidden], frozen.
        targets: [N] int64.
        weights: [N] float32.
    Returns:
        The scalar sum, and the rows' losses [N] (detached).
    """
    total, losses = _WeightedLoss.apply(normed, head, targets, weights)  # type: ignore[no-untyped-call]
    return total, losses
