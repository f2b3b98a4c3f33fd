"""Which stages have kernels, whatever the layout in which rows come from the products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ponderttt.models.layers import LayerNorm, RMSNorm, Rotary, rotate
from ponderttt.models.native import elementwise
from ponderttt.models.native.stages import NativeStages
from ponderttt.models.product import FrozenMatrix
from ponderttt.models.stages import Norm
from tests.ponderttt import reference

STAGES = NativeStages("silu")
NORM = RMSNorm(reference.noise(192, seed=1), 1e-5)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels, call by call."""
    calls: list[str] = []
    for name in ("add_rms_norm", "silu_gate", "rotate_"):
        kernel = getattr(elementwise, name)

        def noted(*given: Tensor, name: str = name, kernel: Any = kernel) -> Any:
            calls.append(name)
            return kernel(*given)

        monkeypatch.setattr(elementwise, name, noted)
    return calls


def columns(width: int, *, packed: bool, rows: int) -> Tensor:
    """Rows [rows, width] that come from a product as columns."""
    matrix = FrozenMatrix(reference.noise(width, 64), packed=packed)
    with torch.inference_mode():
        found = matrix(reference.noise(rows, 64, seed=1))
    assert found.stride() == (1, rows)
    return found


@pytest.mark.parametrize(("packed", "rows"), [(True, 2), (False, 9)])
@torch.inference_mode()
def test_sums_and_rotations_of_columns_have_kernels(
    used: list[str], packed: bool, rows: int
) -> None:
    x, delta = reference.noise(rows, 192, seed=2), columns(192, packed=packed, rows=rows)
    found = STAGES.add_norm(x, delta, NORM)
    assert used == ["add_rms_norm"]
    for ours, wanted in zip(found, STAGES.add_norm(x, delta.contiguous(), NORM), strict=True):
        assert torch.equal(ours, wanted)
    used.clear()
    heads = columns(5 * 64, packed=packed, rows=rows).unflatten(-1, (5, 64))
    before = heads.clone()
    angles = 1 / 10000 ** (torch.arange(32) / 32)
    rope = Rotary(angles, 1.0, 500, torch.device("cpu"), torch.float32).at(torch.arange(rows))
    turned = STAGES.rotate(heads, 4, *rope)
    assert used == ["rotate_"]
    torch.testing.assert_close(turned, rotate(before[:, :4], *rope), rtol=1e-6, atol=1e-6)
    assert torch.equal(heads[:, 4:], before[:, 4:])


def test_columns_that_learn_keep_their_gradients(used: list[str]) -> None:
    x, delta = reference.noise(2, 192), reference.noise(192, 2, seed=1).requires_grad_()
    _, normed = STAGES.add_norm(x, delta.t(), NORM)
    assert used
    (found,) = torch.autograd.grad(normed.square().sum(), delta)
    (wanted,) = torch.autograd.grad(NORM(x + delta.t()).square().sum(), delta)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "norm"),
    [
        (reference.noise(3, 192).double(), RMSNorm(NORM.weight.double(), 1e-5)),
        (reference.noise(3, 192), LayerNorm(NORM.weight, NORM.weight, 1e-5)),
        (reference.noise(192, 3).t(), NORM),
    ],
    ids=["dtype", "layer norm", "columns"],
)
def test_norm_without_a_kernel_is_torchs_with_nothing_added(
    used: list[str], x: Tensor, norm: Norm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(NativeStages, "add_norm")
    assert torch.equal(STAGES.norm(x, norm), norm(x))
    assert not used


def test_norm_is_that_of_a_sum_with_nothing(used: list[str]) -> None:
    x = reference.noise(3, 192)
    assert torch.equal(STAGES.norm(x, NORM), STAGES.add_norm(x, torch.zeros_like(x), NORM)[1])
    assert used == ["add_rms_norm"] * 2
