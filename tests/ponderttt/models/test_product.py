"""Products with a frozen matrix, against torch's linear layer."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ponderttt.models.product import FrozenMatrix, can_pack
from tests.ponderttt import reference


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 31, 192, 193, 400])
@pytest.mark.parametrize("out", [8, 24, 50, 960])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_product_equals_a_linear_layer(rows: int, out: int, with_bias: bool, packed: bool) -> None:
    x, weight = reference.noise(rows, 48), reference.noise(out, 48, seed=1)
    bias = reference.noise(out, seed=2) if with_bias else None
    matrix = FrozenMatrix(weight, packed=packed)
    with torch.inference_mode():
        found = matrix(x, bias)
    assert found.shape == (rows, out)
    torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_product_is_differentiable_in_the_rows(rows: int, with_bias: bool, packed: bool) -> None:
    x = reference.noise(rows, 48).requires_grad_()
    weight = reference.noise(24, 48, seed=1)
    bias = reference.noise(24, seed=2) if with_bias else None
    matrix = FrozenMatrix(weight, packed=packed)
    (found,) = torch.autograd.grad(matrix(x, bias).square().sum(), x)
    (wanted,) = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_way_back_is_the_product_with_the_matrix_itself(packed: bool) -> None:
    gradient, weight = reference.noise(7, 24), reference.noise(24, 48, seed=1)
    found = FrozenMatrix(weight, packed=packed).back(gradient)
    torch.testing.assert_close(found, gradient @ weight, rtol=1e-5, atol=1e-5)


def test_layouts_made_in_inference_mode_serve_a_backward_pass() -> None:
    x, weight = reference.noise(6, 48), reference.noise(24, 48, seed=1)
    with torch.inference_mode():
        matrix = FrozenMatrix(weight)
        matrix.back(matrix(x))
    x.requires_grad_()
    (found,) = torch.autograd.grad(matrix(x).sum(), x)
    torch.testing.assert_close(found, weight.sum(dim=0).expand(6, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_a_view_are_no_trouble(packed: bool) -> None:
    x = reference.noise(6, 96)[::2, ::2]
    weight = reference.noise(24, 48, seed=1)
    with torch.no_grad():
        found = FrozenMatrix(weight, packed=packed)(x)
    torch.testing.assert_close(found, F.linear(x, weight), rtol=1e-5, atol=1e-5)


def test_rows_do_not_depend_on_the_rows_beside_them() -> None:
    x, weight = reference.noise(300, 48), reference.noise(960, 48, seed=1)
    matrix = FrozenMatrix(weight)
    with torch.inference_mode():
        whole = matrix(x)
        for count in (3, 16, 17, 255):
            torch.testing.assert_close(matrix(x[:count]), whole[:count], rtol=1e-6, atol=1e-6)


def test_memory_of_the_further_layouts_is_told() -> None:
    weight = reference.noise(24, 48)
    assert can_pack(weight)
    assert FrozenMatrix(weight, packed=False).packed_bytes == 0
    matrix = FrozenMatrix(weight)
    assert matrix.packed_bytes == weight.nbytes
    matrix.back(reference.noise(2, 24))
    assert matrix.packed_bytes == 2 * weight.nbytes


def test_other_types_are_multiplied_as_they_are() -> None:
    weight, x = reference.noise(24, 48).bfloat16(), reference.noise(5, 48, seed=1).bfloat16()
    assert not can_pack(weight)
    matrix = FrozenMatrix(weight)
    with torch.no_grad():
        torch.testing.assert_close(matrix(x), F.linear(x, weight), rtol=2e-2, atol=2e-2)
    back = matrix.back(reference.noise(5, 24))
    assert back.dtype == torch.bfloat16


def test_memory_stays_bounded_whatever_the_numbers_of_rows() -> None:
    """In a process of its own, since the limit is read at the first product."""
    program = """
import torch
from ponderttt.models.product import FrozenMatrix

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

x, matrix = torch.randn(700, 64), FrozenMatrix(torch.randn(64, 64))
with torch.inference_mode():
    for rows in range(3, 150):
        matrix(x[:rows])
    before = resident()
    for rows in range(150, 700):
        matrix(x[:rows])
print(resident() - before)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    # Observed: 26 MB with the limit, 314 MB without.
    assert int(done.stdout) < 100e6
