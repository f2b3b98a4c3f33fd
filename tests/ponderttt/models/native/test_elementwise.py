"""What lies between the products, against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ponderttt.models.layers import Rotary, rotate
from ponderttt.models.native import elementwise
from tests.ponderttt import reference

MOST_ROWS = 32
# Shared among threads.
MANY_ROWS = 150


@pytest.mark.parametrize("rows", [1, 2, MOST_ROWS, MANY_ROWS])
def test_sum_and_norm_are_torchs(rows: int) -> None:
    x, delta = (5 * reference.noise(rows, 2 * 576)).split(576, dim=1)
    weight = reference.noise(576, seed=1)
    total, normed = elementwise.add_rms_norm(x, delta, weight, 1e-5)
    assert torch.equal(total, x + delta)
    wanted = F.rms_norm(total, (576,), weight, 1e-5)
    torch.testing.assert_close(normed, wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, MOST_ROWS, MANY_ROWS])
def test_gate_is_silu_times_up(rows: int) -> None:
    whole = 30 * reference.noise(rows, 2 * 1536)
    whole[0, :6] = torch.tensor([0.0, -0.0, 200.0, -200.0, 1e-30, -87.5])
    gate, up = whole.split(1536, dim=1)
    found = elementwise.silu_gate(gate, up)
    torch.testing.assert_close(found, F.silu(gate) * up, rtol=2e-6, atol=1e-30)


# What is differentiated, and by what.
@pytest.mark.parametrize("by", ["x and delta", "x", "delta"])
@pytest.mark.parametrize("of_what", ["both", "total", "normed"])
@pytest.mark.parametrize("rows", [1, MANY_ROWS])
def test_gradients_of_sum_and_norm_are_those_of_torch_in_float64(
    rows: int, of_what: str, by: str
) -> None:
    x, delta = (reference.noise(rows, 2 * 576)).split(576, dim=1)
    weight = reference.noise(576, seed=1)
    at_total, at_normed = reference.noise(rows, 576, seed=2), reference.noise(rows, 576, seed=3)

    def gradients(of: torch.dtype, native: bool) -> tuple[Tensor, ...]:
        given = {"x": x.to(of), "delta": delta.to(of)}
        ours = [given[name].requires_grad_() for name in by.split(" and ")]
        if native:
            total, normed = elementwise.add_rms_norm(given["x"], given["delta"], weight, 1e-5)
        else:
            total = given["x"] + given["delta"]
            normed = F.rms_norm(total, (576,), weight.to(of), 1e-5)
        if of_what == "total":
            return torch.autograd.grad(total.sum(), ours)
        if of_what == "normed":
            return torch.autograd.grad(normed.sum(), ours)
        return torch.autograd.grad((total, normed), ours, (at_total.to(of), at_normed.to(of)))

    exact = gradients(torch.float64, native=False)
    for found, usual, wanted in zip(
        gradients(torch.float32, native=True),
        gradients(torch.float32, native=False),
        exact,
        strict=True,
    ):
        assert (found - wanted).abs().max() <= 2 * (usual - wanted).abs().max() + 1e-6


@pytest.mark.parametrize("rows", [1, MANY_ROWS])
def test_gradients_of_the_gate_are_those_of_torch_in_float64(rows: int) -> None:
    whole = 10 * reference.noise(rows, 2 * 1536)
    whole[0, :6] = torch.tensor([0.0, -0.0, 200.0, -200.0, 1e-30, -87.5])
    at = reference.noise(rows, 1536, seed=1)

    def gradient(of: torch.dtype, native: bool) -> Tensor:
        joined = whole.to(of).requires_grad_()
        gate, up = joined.split(1536, dim=1)
        y = elementwise.silu_gate(gate, up) if native else F.silu(gate) * up
        return torch.autograd.grad(y, joined, at.to(of))[0]

    found, wanted = gradient(torch.float32, native=True), gradient(torch.float64, native=False)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("learning", [0, 1])
def test_gradient_of_the_gate_by_one_of_its_inputs(learning: int) -> None:
    given = list(reference.noise(5, 2 * 1536).split(1536, dim=1))
    given[learning] = given[learning].clone().requires_grad_()
    (found,) = torch.autograd.grad(elementwise.silu_gate(*given).sum(), given[learning])
    (wanted,) = torch.autograd.grad((F.silu(given[0]) * given[1]).sum(), given[learning])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [3, MANY_ROWS])
def test_rotation_turns_the_first_heads_in_place(rows: int) -> None:
    rotary = Rotary(1 / 10000 ** (torch.arange(32) / 32), 1.0, 500, *_CPU)
    rope = rotary.at(torch.arange(rows) * 499 // (rows - 1))
    joined = reference.noise(rows, 15, 64)
    wanted, rest = rotate(joined[:, :12], *rope), joined[:, 12:].clone()
    elementwise.rotate_(joined[:, :12], *rope)
    torch.testing.assert_close(joined[:, :12], wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(joined[:, 12:], rest)


_CPU = (torch.device("cpu"), torch.float32)


def test_results_are_the_same_on_two_threads_as_on_one() -> None:
    rotary = Rotary(1 / 10000 ** (torch.arange(32) / 32), 1.0, 500, *_CPU)
    weight = reference.noise(576, seed=1)

    def everything() -> tuple[Tensor, ...]:
        x, delta, gate, up = (
            reference.noise(MANY_ROWS, 576, seed=seed).requires_grad_() for seed in range(2, 6)
        )
        total, normed = elementwise.add_rms_norm(x, delta, weight, 1e-5)
        product = elementwise.silu_gate(gate, up)
        at = [reference.noise(MANY_ROWS, 576, seed=seed) for seed in range(6, 9)]
        back = torch.autograd.grad((total, normed, product), (x, delta, gate, up), at)
        rope = rotary.at(torch.arange(MANY_ROWS))
        turned = elementwise.rotate_(reference.noise(MANY_ROWS, 12, 64), *rope)
        return total, normed, product, turned, *back

    before, wanted = torch.get_num_threads(), everything()
    try:
        torch.set_num_threads(2)
        found = everything()
    finally:
        torch.set_num_threads(before)
    assert before == 1
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_only_float32_in_whole_vectors_is_taken() -> None:
    x = reference.noise(4, 64)
    assert elementwise.takes(x)
    assert not elementwise.takes(x.double())
    assert not elementwise.takes(x[:, :40])
    assert not elementwise.takes(x.T)


def test_only_heads_of_one_size_side_by_side_are_rotated() -> None:
    heads = reference.noise(2, 3, 64)
    assert elementwise.can_rotate(heads)
    assert elementwise.can_rotate(heads[:, 1:])
    assert not elementwise.can_rotate(reference.noise(2, 3, 32))
    assert not elementwise.can_rotate(heads[:, ::2])
    learning = heads.clone().requires_grad_()
    assert not elementwise.can_rotate(learning)
    with torch.inference_mode():
        assert elementwise.can_rotate(learning)
