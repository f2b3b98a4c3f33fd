"""Losses in slices, against torch's cross-entropy under autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ponderttt.adaptation.loss import (
    SLICE_ROWS,
    logit_slices,
    losses_and_gradient,
    token_losses,
)
from ponderttt.models.product import FrozenMatrix
from tests.ponderttt import reference

HIDDEN, VOCABULARY = 16, 50
ROWS = [1, SLICE_ROWS - 1, SLICE_ROWS, SLICE_ROWS + 1, 300]


def make(rows: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Normed rows, output matrix, targets; whole multiples of 1/32, so that logits are exact."""
    normed = (reference.noise(rows, HIDDEN) * 4).round() / 4 * spread
    head = (reference.noise(VOCABULARY, HIDDEN, seed=1) * 8).round() / 8
    return normed, head, torch.tensor(reference.random_ids(VOCABULARY, rows, seed=2))


def test_slices_cover_every_row_once_and_stay_small() -> None:
    normed, head, _ = make(300)
    slices = list(logit_slices(normed, FrozenMatrix(head)))
    assert [rows.stop - rows.start for rows, _ in slices] == [128, 128, 44]
    torch.testing.assert_close(
        torch.cat([logits for _, logits in slices]), normed @ head.T, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_token_losses_equal_cross_entropy(rows: int, spread: float) -> None:
    """The second spread gives logits of thousands, whose exponentials would overflow."""
    normed, head, targets = make(rows, spread)
    losses = token_losses(normed, FrozenMatrix(head), targets)
    expected = F.cross_entropy(normed @ head.T, targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-5)


def ours(normed: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return losses_and_gradient(normed, FrozenMatrix(head), targets, weights)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("spread", "tolerance"), [(1.0, 1e-5), (300.0, 2e-3)])
def test_losses_and_their_gradient_equal_cross_entropy(
    rows: int, spread: float, tolerance: float
) -> None:
    """Logits of thousands come as multiples of 2e-4 in float32, hence the second tolerance."""
    normed, head, targets = make(rows, spread)
    weights = reference.noise(rows, seed=3).abs()
    weights[0] = 0.25
    weights[1::7] = 0.0
    losses, gradient = ours(normed, head, targets, weights)
    normed.requires_grad_()
    each = F.cross_entropy(normed @ head.T, targets, reduction="none")
    (expected,) = torch.autograd.grad((each * weights).sum(), normed)
    torch.testing.assert_close(losses, each.detach(), rtol=1e-6, atol=1e-5)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=tolerance)


def test_row_that_is_not_finite_leaves_the_others() -> None:
    normed, head, targets = make(140)
    weights = torch.full((140,), 1.0)
    losses, gradient = ours(normed, head, targets, weights)
    normed[130, 3] = float("nan")
    spoiled_losses, spoiled = ours(normed, head, targets, weights)
    others = torch.arange(140) != 130
    assert spoiled_losses[130].isnan()
    assert spoiled[130].isnan().any()
    assert torch.equal(spoiled_losses[others], losses[others])
    assert torch.equal(spoiled[others], gradient[others])
