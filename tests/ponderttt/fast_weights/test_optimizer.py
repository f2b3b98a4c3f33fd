"""Clipping and Adam over rows, against torch's own on one row at a time."""

from __future__ import annotations

import pytest
import torch

from ponderttt.fast_weights.optimizer import adam_rows, clip_rows
from tests.ponderttt import reference

ROWS, SIZE = 4, 50
RATES = torch.tensor([1e-3, 3e-3, 1e-1, 1e-4])


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 100.0])
def test_clip_rows_equals_clip_grad_norm_of_each_row(max_norm: float) -> None:
    # Norms of about 7e-6, 0.7, 7 and 7e6, and one of zero.
    sizes = torch.tensor([1e-6, 0.1, 1.0, 1e6, 0.0])[:, None]
    gradients = reference.noise(5, SIZE) * sizes
    expected = []
    for row in gradients:
        parameter = torch.nn.Parameter(torch.zeros(SIZE))
        parameter.grad = row.clone()
        torch.nn.utils.clip_grad_norm_([parameter], max_norm)
        expected.append(parameter.grad)
    clipped = clip_rows(gradients, max_norm)
    torch.testing.assert_close(clipped, torch.stack(expected), rtol=1e-6, atol=1e-9)


def test_clip_of_a_row_that_is_not_finite_leaves_the_others() -> None:
    gradients = reference.noise(3, SIZE) * 10
    expected = clip_rows(gradients, 1.0)
    gradients[1, 7] = float("nan")
    clipped = clip_rows(gradients, 1.0)
    assert clipped[1].isnan().all()
    assert torch.equal(clipped[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.999), (0.5, 0.0)])
def test_adam_rows_equals_torch_adam_with_a_step_count_per_row(
    betas: tuple[float, float],
) -> None:
    """Row i joins at round 2 * i: each has its own number of steps behind it."""
    weights = reference.noise(ROWS, SIZE)
    parameters = [torch.nn.Parameter(row.clone()) for row in weights]
    optimisers = [
        torch.optim.Adam([parameter], lr=float(rate), betas=betas, eps=1e-8)
        for parameter, rate in zip(parameters, RATES, strict=True)
    ]
    first, second = torch.zeros(ROWS, SIZE), torch.zeros(ROWS, SIZE)
    steps = torch.zeros(ROWS, dtype=torch.int64)
    for turn in range(10 + 2 * (ROWS - 1)):
        gradients = reference.noise(ROWS, SIZE, seed=turn) * 10 ** (turn % 5 - 3)
        active = torch.tensor([turn >= 2 * row and steps[row] < 10 for row in range(ROWS)])
        steps[active] += 1
        weights[active], first[active], second[active] = adam_rows(
            weights[active], gradients[active], first[active], second[active],
            steps[active], RATES[active], betas, 1e-8,
        )  # fmt: skip
        for row in active.nonzero().flatten().tolist():
            parameters[row].grad = gradients[row].clone()
            optimisers[row].step()
    assert steps.tolist() == [10] * ROWS
    expected = torch.stack([parameter.detach() for parameter in parameters])
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
    moments = [optimiser.state[p] for optimiser, p in zip(optimisers, parameters, strict=True)]
    for ours, name in ((first, "exp_avg"), (second, "exp_avg_sq")):
        theirs = torch.stack([state[name] for state in moments])
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_adam_rows_leaves_its_arguments_as_they_are() -> None:
    weights, gradients, first = (reference.noise(2, SIZE, seed=seed) for seed in range(3))
    second = reference.noise(2, SIZE, seed=3).abs()
    arguments = (weights, gradients, first, second)
    kept = [argument.clone() for argument in arguments]
    steps, rates = torch.tensor([1, 5]), torch.full((2,), 1e-3)
    adam_rows(weights, gradients, first, second, steps, rates, (0.9, 0.99), 1e-8)
    assert all(torch.equal(now, before) for now, before in zip(arguments, kept, strict=True))
    assert steps.tolist() == [1, 5]
