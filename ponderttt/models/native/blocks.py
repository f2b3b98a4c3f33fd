"""Whole transformer blocks of a decode step in one call."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ponderttt.models.config import ModelConfig
from ponderttt.models.layers import FusedLinear, RMSNorm
from ponderttt.models.native import elementwise
from ponderttt.models.native.decode_attention import DecodeAttention
from ponderttt.models.native.library import library

if TYPE_CHECKING:
    from ponderttt.models.decoder import Block

_HEAD = 64


class _Coded(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("in", "out", "group", "bits")),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("attention_eps", ctypes.c_float),
        ("mlp_eps", ctypes.c_float),
        *((name, _Coded) for name in ("qkv", "output", "up", "down")),
    )


class _Places(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("keys", "values", "layer_strides", "head_strides", "first", "last")
    )


class NativeBlocks:
    """Blocks without an adapter while decoding: as `Decoder.run` with kernels, to the bit.

    Between the kernels lies no Python, which takes a third of a step of one row.
    """

    def __init__(self, config: ModelConfig, blocks: Sequence[Block]) -> None:
        self._blocks = blocks  # whose memory the table points to
        self._config = config
        self._table = (_Block * len(blocks))(*(_described(block) for block in blocks))

    @classmethod
    def of(cls, config: ModelConfig, blocks: Sequence[Block]) -> NativeBlocks | None:
        """For these blocks; None where there is no kernel for one, or it has no codes."""
        fits = (
            config.activation == "silu"
            and config.gated_mlp
            and config.head_dim == _HEAD
            and config.inv_freq is not None
            and len(set(config.sliding_windows)) == 1
            and all(isinstance(n, RMSNorm) for b in blocks for n in (b.attention_norm, b.mlp_norm))
            and all(linear.matrix.codes is not None for b in blocks for linear in b.linears())
            and library() is not None
        )
        return cls(config, blocks) if fits else None

    def __call__(
        self,
        x: Tensor,
        first: int,
        last: int,
        places: DecodeAttention,
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Blocks first … last-1 over [N, hidden], a row of each sequence; `takes(x)` must hold."""
        native = library()
        assert native is not None
        c, rows = self._config, x.shape[0]
        widths = (
            c.hidden_size,
            c.hidden_size,
            (c.num_heads + 2 * c.num_kv_heads) * _HEAD,
            c.num_heads * _HEAD,
            2 * c.intermediate_size,
            c.intermediate_size,
            max(c.hidden_size, c.intermediate_size, c.num_heads * _HEAD),
        )
        x = x.clone(memory_format=torch.contiguous_format)
        room = [torch.empty(rows * width, dtype=torch.float32) for width in widths]
        table = _Places(
            *(
                ctypes.addressof(array)
                for array in (
                    places.keys,
                    places.values,
                    places.layer_strides,
                    places.head_strides,
                    places.first,
                    places.last,
                )
            )
        )
        native.ponderttt_blocks(
            self._table,
            first,
            last,
            ctypes.addressof(table),
            x.data_ptr(),
            rows,
            c.num_heads,
            c.num_kv_heads,
            rope[0].data_ptr(),
            rope[1].data_ptr(),
            1 / math.sqrt(_HEAD),
            *(part.data_ptr() for part in room),
            torch.get_num_threads(),
        )
        return x

    @staticmethod
    def takes(x: Tensor) -> bool:
        """Whether the kernels take these rows, [N, hidden]."""
        return elementwise.takes(x)


def _described(block: Block) -> _Block:
    norms = (block.attention_norm, block.mlp_norm)
    return _Block(
        *(norm.weight.data_ptr() for norm in norms),
        *(norm.eps for norm in norms),
        *(_coded(linear) for linear in block.linears()),
    )


def _coded(linear: FusedLinear) -> _Coded:
    found = linear.matrix.codes
    assert found is not None
    out, width = found.shape
    bias = None if linear.bias is None else linear.bias.data_ptr()
    return _Coded(found.codes.data_ptr(), bias, width, out, found.group, found.bits)
