"""Deltas for rows of different owners, against one row at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ponderttt.fast_weights.adapter import BatchedAdapter
from tests.ponderttt import reference

SLOTS, RANK, IN, OUT = 4, 3, 6, 5
SCALE = 2.5
AT = (1, "mlp.up_proj")


def matrices() -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """Slot 0 is zeros, as in a bank."""
    a, b = reference.noise(SLOTS, RANK, IN), reference.noise(SLOTS, OUT, RANK, seed=1)
    a[0], b[0] = 0.0, 0.0
    return {AT: (a, b)}


def row_by_row(
    pairs: tuple[Tensor, Tensor], slots: Sequence[int], lengths: Sequence[int], x: Tensor
) -> Tensor:
    owners = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
    a, b = pairs
    return torch.stack(
        [SCALE * (b[slot] @ (a[slot] @ row)) for slot, row in zip(owners, x, strict=True)]
    )


PATHS = [
    pytest.param([2], [7], id="one owner"),
    pytest.param([2, 2, 2], [1, 4, 2], id="one owner, several segments"),
    pytest.param([1, 2, 3], [4, 4, 4], id="even lengths"),
    pytest.param([3, 1, 3], [4, 4, 4], id="even lengths, an owner twice"),
    pytest.param([0, 1, 2, 3], [1, 1, 1, 1], id="all slots in order, one row each"),
    pytest.param([1, 2, 3], [5, 1, 3], id="ragged"),
    pytest.param([0, 3, 0, 1], [2, 2, 2, 2], id="base slot mixed in, even"),
    pytest.param([0, 3, 0, 1], [3, 1, 2, 4], id="base slot mixed in, ragged"),
    pytest.param([0], [3], id="base slot alone"),
]


@pytest.mark.parametrize(("slots", "lengths"), PATHS)
def test_delta_equals_a_loop_over_the_rows(slots: list[int], lengths: list[int]) -> None:
    pairs = matrices()
    x = reference.noise(sum(lengths), IN, seed=2)
    delta = BatchedAdapter(pairs, slots, lengths, SCALE).delta(*AT, x)
    assert delta is not None
    torch.testing.assert_close(delta, row_by_row(pairs[AT], slots, lengths, x), rtol=0, atol=1e-5)
    base = torch.tensor([slot == 0 for slot in slots]).repeat_interleave(torch.tensor(lengths))
    assert delta[base].eq(0).all()
    assert delta[~base].abs().sum(dim=1).gt(0).all()


@pytest.mark.parametrize(("slots", "lengths"), PATHS)
def test_gradients_of_every_slot_are_those_of_a_loop(slots: list[int], lengths: list[int]) -> None:
    x = reference.noise(sum(lengths), IN, seed=2)
    weights = reference.noise(sum(lengths), OUT, seed=3)
    pairs = {AT: tuple(m.requires_grad_() for m in matrices()[AT])}
    a, b = pairs[AT]
    delta = BatchedAdapter({AT: (a, b)}, slots, lengths, SCALE).delta(*AT, x)
    assert delta is not None
    ours = torch.autograd.grad((delta * weights).sum(), (a, b))
    theirs = torch.autograd.grad((row_by_row((a, b), slots, lengths, x) * weights).sum(), (a, b))
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-4)
    unused = [slot for slot in range(SLOTS) if slot not in slots]
    assert all(mine[unused].eq(0).all() for mine in ours)


def test_module_that_does_not_adapt_gets_nothing() -> None:
    adapter = BatchedAdapter(matrices(), [1], [2], SCALE)
    x = reference.noise(2, IN)
    assert adapter.delta(0, "mlp.up_proj", x) is None
    assert adapter.delta(1, "mlp.down_proj", x) is None
