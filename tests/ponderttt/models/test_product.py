"""Products of a few rows, against torch's linear layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ponderttt.models.product import product
from tests.ponderttt import reference


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 31, 192, 193, 400])
@pytest.mark.parametrize("out", [8, 24, 50, 960])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_equals_a_linear_layer(rows: int, out: int, with_bias: bool) -> None:
    x, weight = reference.noise(rows, 48), reference.noise(out, 48, seed=1)
    bias = reference.noise(out, seed=2) if with_bias else None
    with torch.inference_mode():
        found = product(x, weight, bias)
    assert found.shape == (rows, out)
    torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5])
def test_product_is_differentiable_in_the_rows(rows: int) -> None:
    x = reference.noise(rows, 48).requires_grad_()
    weight = reference.noise(24, 48, seed=1)
    (found,) = torch.autograd.grad(product(x, weight).square().sum(), x)
    (wanted,) = torch.autograd.grad(F.linear(x, weight).square().sum(), x)
    torch.testing.assert_close(found, wanted)


def test_rows_of_a_view_are_no_trouble() -> None:
    x = reference.noise(6, 96)[::2, ::2]
    weight = reference.noise(24, 48, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(product(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)
