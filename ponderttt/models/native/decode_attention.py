"""Attention of a decode step: one new position of each of several sequences."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ponderttt.models.kv_cache import KVCache
from ponderttt.models.native.library import library

_HEAD = 64
_MOST_GROUP = 8


class DecodeAttention:
    """Where the sequences of one step keep their keys and values, and what they see of them.

    Args:
        places: each sequence's cache and the position of its new row.
        window: positions a row may look back, itself included; None: all.

    Attributes, arrays for C, by sequence: `keys` and `values`, addresses of the first block's;
    `layer_strides` and `head_strides` in floats; `first` and `last` positions that are seen.
    """

    def __init__(self, places: Sequence[tuple[KVCache, int]], window: int | None) -> None:
        count = len(places)
        for cache, at in places:
            cache.check(at + 1)
        # Kept, since the addresses are of them.
        self._caches = [(cache.keys, cache.values) for cache, _ in places]
        longs, pointers = ctypes.c_long * count, ctypes.c_void_p * count
        self._pointers = pointers
        self.keys = pointers(*(keys.data_ptr() for keys, _ in self._caches))
        self.values = pointers(*(values.data_ptr() for _, values in self._caches))
        self.layer_strides = longs(*(keys.stride(0) for keys, _ in self._caches))
        self.head_strides = longs(*(keys.stride(1) for keys, _ in self._caches))
        first = [0 if window is None else max(at + 1 - window, 0) for _, at in places]
        self.first = longs(*first)
        self.last = longs(*(at for _, at in places))

    @staticmethod
    def fits(cache: KVCache, heads: int) -> bool:
        """Whether there is a kernel for this shape here."""
        keys = cache.keys
        return (
            keys.device.type == "cpu"
            and keys.dtype == torch.float32
            and keys.shape[3] == _HEAD
            and heads // keys.shape[1] <= _MOST_GROUP
            and library() is not None
        )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values and attend.

        Args:
            layer: index of the block.
            q: [sequences, heads, 64], rotated.
            k, v: [sequences, kv_heads, 64], keys rotated.
        Returns:
            [sequences, heads * 64].
        """
        native = library()
        assert native is not None
        q, k, v = (_dense(rows) for rows in (q, k, v))
        count, heads = q.shape[:2]
        found = torch.empty(count, heads * _HEAD, dtype=torch.float32)
        native.ponderttt_attend(
            q.data_ptr(),
            q.stride(0),
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            self._pointers(*(keys[layer].data_ptr() for keys, _ in self._caches)),
            self._pointers(*(values[layer].data_ptr() for _, values in self._caches)),
            self.head_strides,
            self.first,
            self.last,
            count,
            k.shape[1],
            heads // k.shape[1],
            1 / math.sqrt(_HEAD),
            found.data_ptr(),
            torch.get_num_threads(),
        )
        return found


def _dense(rows: Tensor) -> Tensor:
    """The heads of a row beside one another; rows may be apart."""
    return rows if rows.stride(2) == 1 and rows.stride(1) == _HEAD else rows.contiguous()
