"""Next-token cross-entropy in slices of rows, so that [T, vocabulary] never exists at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ponderttt.models.product import FrozenMatrix

#: Rows per slice: 128 rows of a vocabulary of 150,000 are 78 MB in float32.
SLICE_ROWS = 128


def logit_slices(normed: Tensor, head: FrozenMatrix) -> Iterator[tuple[slice, Tensor]]:
    """(rows, float32 logits of these rows) for [N, hidden] @ [V, hidden]ᵀ, slice by slice."""
    for begin in range(0, normed.shape[0], SLICE_ROWS):
        rows = slice(begin, min(begin + SLICE_ROWS, normed.shape[0]))
        yield rows, head(normed[rows]).float()


def losses_and_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy [N] in nats, and the softmax [N, V], which takes the place of `logits`.

    Passes over [N, V] cost a good part of what the product before them does, so there are three:
    the greatest logit, the softmax, and the greatest probability. That is never less than 1/V, so
    its logarithm gives the normaliser, where that of a target's own probability may be -inf.
    """
    greatest = logits.amax(dim=1)
    picked = logits.gather(1, targets[:, None]).squeeze(1)
    probabilities = torch.softmax(logits, dim=1, out=logits)
    return greatest - probabilities.amax(dim=1).log() - picked, probabilities


def token_losses(normed: Tensor, head: FrozenMatrix, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each row: [N, hidden], [V, hidden], [N] → [N] float32."""
    losses = torch.empty(normed.shape[0], device=normed.device)
    for rows, logits in logit_slices(normed, head):
        losses[rows], _ = losses_and_probabilities(logits, targets[rows])
    return losses


def gradient_at_top(
    probabilities: Tensor, head: FrozenMatrix, targets: Tensor, weights: Tensor
) -> Tensor:
    """Gradient of the weighted sum of the rows' losses with respect to the rows.

    Args:
        probabilities: [N, V] float32, of the rows after the final norm; overwritten.
        head: [V, hidden], frozen.
        targets: [N] int64.
        weights: [N] float32, of the rows' losses.
    Returns:
        [N, hidden], in the head's dtype.
    """
    minus_one = torch.full_like(weights[:, None], -1.0)
    probabilities.scatter_add_(1, targets[:, None], minus_one)
    # Rows are scaled after the product: there are hidden numbers in each, not V.
    return head.back(probabilities).mul_(weights[:, None])


def losses_and_gradient(
    normed: Tensor, head: FrozenMatrix, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Each row's cross-entropy, and the gradient of their weighted sum with respect to the rows.

    Args:
        normed: [N, hidden], rows after the final norm.
        head, targets, weights: as of `gradient_at_top`.
    Returns:
        Losses [N] float32, in nats, and the gradient [N, hidden] in the head's dtype.
    """
    losses, gradient = torch.empty_like(weights), torch.empty_like(normed)
    for rows, logits in logit_slices(normed, head):
        losses[rows], probabilities = losses_and_probabilities(logits, targets[rows])
        gradient[rows] = gradient_at_top(probabilities, head, targets[rows], weights[rows])
    return losses, gradient
