"""Clipping, Adam, SGD and what bounds the weights, against torch's own on one row at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ponderttt.fast_weights.optimizer import (
    adam_rows,
    clip_rows,
    decay_rows,
    project_rows,
    sgd_rows,
)
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


@pytest.mark.parametrize("momentum", [0.0, 0.6, 0.95])
def test_sgd_rows_equals_torch_sgd_of_each_row(momentum: float) -> None:
    weights, first = reference.noise(ROWS, SIZE), torch.zeros(ROWS, SIZE)
    parameters = [torch.nn.Parameter(row.clone()) for row in weights]
    optimisers = [
        torch.optim.SGD([parameter], lr=float(rate), momentum=momentum)
        for parameter, rate in zip(parameters, RATES, strict=True)
    ]
    for turn in range(8):
        gradients = reference.noise(ROWS, SIZE, seed=turn)
        weights, first = sgd_rows(weights, gradients, first, RATES, momentum)
        for row, (parameter, optimiser) in enumerate(zip(parameters, optimisers, strict=True)):
            parameter.grad = gradients[row].clone()
            optimiser.step()
    expected = torch.stack([parameter.detach() for parameter in parameters])
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-6)


def test_sgd_rows_leaves_its_arguments_as_they_are() -> None:
    weights, gradients, first = arguments = [reference.noise(2, SIZE, seed=s) for s in range(3)]
    kept = [argument.clone() for argument in arguments]
    sgd_rows(weights, gradients, first, torch.full((2,), 0.1), 0.9)
    assert all(torch.equal(now, before) for now, before in zip(arguments, kept, strict=True))


def test_decay_rows_takes_back_its_share_of_the_distance() -> None:
    fresh, offsets = reference.noise(SIZE), reference.noise(ROWS, SIZE, seed=1)
    decayed = decay_rows(fresh + offsets, fresh, 0.25)
    torch.testing.assert_close(decayed - fresh, 0.75 * offsets, rtol=0, atol=1e-6)
    assert torch.equal(decay_rows(fresh[None], fresh, 0.25)[0], fresh)


@given(
    radius=st.floats(1e-3, 1e3),
    sizes=st.lists(st.floats(0.0, 1e4), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_project_rows_gives_the_nearest_point_of_the_ball(
    radius: float, sizes: list[float], seed: int
) -> None:
    fresh = reference.noise(SIZE, seed=seed)
    weights = (
        fresh + reference.noise(len(sizes), SIZE, seed=seed + 1) * torch.tensor(sizes)[:, None]
    )
    projected = project_rows(weights, fresh, radius)
    for row, before in zip(projected, weights, strict=True):
        offset = before - fresh
        if float(offset.norm()) <= radius:
            assert torch.equal(row, before)
            continue
        # Coordinates near 1 are rounded to 6e-8 before the distance is taken.
        assert float((row - fresh).norm()) == pytest.approx(radius, rel=1e-5, abs=1e-6)
        torch.testing.assert_close(
            row - fresh, offset * (radius / offset.norm()), rtol=1e-5, atol=1e-6
        )


def test_rows_inside_the_ball_are_left_bit_for_bit() -> None:
    # The distance from such a centre is rounded, so to go there and back would change the weights.
    fresh, weights = 0.37 * reference.noise(SIZE), 10 * reference.noise(ROWS, SIZE, seed=1)
    assert not torch.equal(fresh + (weights - fresh), weights)
    assert torch.equal(project_rows(weights, fresh, 1e3), weights)


def test_projection_of_a_row_that_is_not_finite_does_not_hide_it() -> None:
    fresh = torch.zeros(SIZE)
    weights = reference.noise(3, SIZE)
    weights[0, 3], weights[1, 4] = float("nan"), float("inf")
    projected = project_rows(weights, fresh, 0.5)
    assert not projected[0].isfinite().all()
    assert not projected[1].isfinite().all()
    assert projected[2].isfinite().all()
