"""What lies between the products of a step that decodes: norms, rotary positions, gates."""

from __future__ import annotations

import torch
from torch import Tensor

from ponderttt.models.native.library import library

_LANES = 16
_HEAD = 64


def takes(x: Tensor) -> bool:
    """Whether the kernels take these rows: float32, on a CPU, and not differentiated."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.shape[-1] % _LANES == 0
        and x.stride(-1) == 1
        and not (x.requires_grad and torch.is_grad_enabled())
        and library() is not None
    )


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta and its `rms_norm`, all [N, width]; `takes` must hold for both."""
    native = library()
    assert native is not None
    rows, width = x.shape
    total, normed = torch.empty(2, rows, width, dtype=torch.float32)
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
    )
    return total, normed


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) × up, [N, width] each; `takes` must hold for both."""
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
    )
    return heads


def can_rotate(heads: Tensor) -> bool:
    """Whether `rotate_` takes [N, heads, D]: as `takes`, heads of 64 beside one another."""
    return takes(heads) and heads.shape[2] == _HEAD and heads.stride(1) == _HEAD
