"""What lies between the products of a block: norms, rotary positions, gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ponderttt.models.native.library import library

_LANES = 16
_HEAD = 64


def takes(x: Tensor) -> bool:
    """Whether the kernels take these rows: float32, on a CPU, each row in one piece."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.shape[-1] % _LANES == 0
        and x.stride(-1) == 1
        and library() is not None
    )


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta and its `rms_norm`, all [N, width]; differentiable; `takes` must hold for both."""
    if _learns(x, delta):
        found: tuple[Tensor, Tensor] = _AddRMSNorm.apply(x, delta, weight, eps)  # type: ignore[no-untyped-call]
        return found
    native = library()
    assert native is not None
    rows, width = x.shape
    # Not two views of one, which a function of autograd can't return.
    total, normed = (torch.empty(rows, width, dtype=torch.float32) for _ in range(2))
    native.ponderttt_add_rms_norm(
        x.data_ptr(),
        x.stride(0),
        delta.data_ptr(),
        delta.stride(0),
        rows,
        width,
        weight.data_ptr(),
        eps,
        total.data_ptr(),
        normed.data_ptr(),
        torch.get_num_threads(),
    )
    return total, normed


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, normed = add_rms_norm(x, delta, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_total: Tensor, at_normed: Tensor) -> tuple[Tensor | None, ...]:
        native = library()
        assert native is not None
        total, weight = ctx.saved_tensors
        at_total, at_normed = at_total.contiguous(), at_normed.contiguous()
        found = torch.empty_like(total)
        native.ponderttt_rms_norm_back(
            total.data_ptr(),
            *total.shape,
            weight.data_ptr(),
            ctx.eps,
            at_total.data_ptr(),
            at_total.stride(0),
            at_normed.data_ptr(),
            at_normed.stride(0),
            found.data_ptr(),
            torch.get_num_threads(),
        )
        return found, found, None, None


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) × up, [N, width] each; differentiable; `takes` must hold for both."""
    if _learns(gate, up):
        product: Tensor = _SiluGate.apply(gate, up)  # type: ignore[no-untyped-call]
        return product
    native = library()
    assert native is not None
    rows, width = gate.shape
    found = torch.empty(rows, width, dtype=torch.float32)
    native.ponderttt_silu_gate(
        gate.data_ptr(),
        gate.stride(0),
        up.data_ptr(),
        up.stride(0),
        rows,
        width,
        found.data_ptr(),
        torch.get_num_threads(),
    )
    return found


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu_gate(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_y: Tensor) -> tuple[Tensor, Tensor]:
        native = library()
        assert native is not None
        gate, up = ctx.saved_tensors
        at_y = at_y.contiguous()
        rows, width = at_y.shape
        found = torch.empty(rows, 2, width, dtype=torch.float32)
        at_gate, at_up = found[:, 0], found[:, 1]
        native.ponderttt_silu_gate_back(
            gate.data_ptr(),
            gate.stride(0),
            up.data_ptr(),
            up.stride(0),
            at_y.data_ptr(),
            at_y.stride(0),
            rows,
            width,
            at_gate.data_ptr(),
            at_up.data_ptr(),
            torch.get_num_threads(),
        )
        return at_gate, at_up


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [N, heads, 64] in place, by cos and sin [N, 1, 64] as of `Rotary.at`."""
    native = library()
    assert native is not None
    native.ponderttt_rotate(
        heads.data_ptr(),
        heads.stride(0),
        heads.shape[0],
        heads.shape[1],
        cos.data_ptr(),
        sin.data_ptr(),
        torch.get_num_threads(),
    )
    return heads


def can_rotate(heads: Tensor) -> bool:
    """Whether `rotate_` takes [N, heads, D]: heads of 64 beside one another, not differentiated."""
    return (
        takes(heads) and not _learns(heads) and heads.shape[2] == _HEAD and heads.stride(1) == _HEAD
    )
