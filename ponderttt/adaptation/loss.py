"""Next-token cross-entropy in slices of rows, so that [T, vocabulary] never exists at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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


def token_losses(normed: Tensor, head: FrozenMatrix, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each row: [N, hidden], [V, hidden], [N] → [N] float32."""
    losses = torch.empty(normed.shape[0], device=normed.device)
    for rows, logits in logit_slices(normed, head):
        picked = logits.gather(1, targets[rows, None]).squeeze(1)
        losses[rows] = logits.logsumexp(dim=1) - picked
    return losses


def losses_and_gradient(
    slices: Iterable[tuple[slice, Tensor]], head: FrozenMatrix, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Each row's cross-entropy, and the gradient of their weighted sum with respect to the rows.

    Args:
        slices: as of `logit_slices`, of [N, hidden] rows after the final norm; overwritten.
        head: [V, hidden], frozen.
        targets: [N] int64.
        weights: [N] float32, of the rows' losses.
    Returns:
        Losses [N] float32, in nats, and the gradient [N, hidden] in the head's dtype.
    """
    weight = head.weight
    losses = torch.empty(targets.shape[0], device=weight.device)
    shape = (targets.shape[0], weight.shape[1])
    gradient = torch.empty(shape, device=weight.device, dtype=weight.dtype)
    for rows, logits in slices:
        log_norm = logits.logsumexp(dim=1, keepdim=True)
        losses[rows] = (log_norm - logits.gather(1, targets[rows, None])).squeeze(1)
        probabilities = logits.sub_(log_norm).exp_()
        probabilities.scatter_add_(1, targets[rows, None], torch.full_like(log_norm, -1.0))
        probabilities.mul_(weights[rows, None])
        gradient[rows] = head.back(probabilities)
    return losses, gradient
