"""Keys and values of one sequence."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of one sequence, in one static buffer per direction.

    Shapes: `keys`, `values` [layers, kv_heads, capacity, head_dim]; positions beyond `length` hold
    nothing. The buffers are ordinary (not inference-mode) tensors, so that a write may replay the
    adaptive blocks over them with gradients.

    Args:
        layers, kv_heads, head_dim: the model's.
        capacity: positions that fit; a write beyond it raises IndexError.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        with torch.inference_mode(False):
            shape = (layers, kv_heads, capacity, head_dim)
            self.keys = torch.empty(shape, device=device, dtype=dtype)
            self.values = torch.empty(shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.length = 0

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store `keys`, `values` [T, kv_heads, head_dim] at positions start … start+T-1.

        Returns:
            All keys and values of the layer up to there, each [kv_heads, start + T, head_dim].
        """
        end = start + keys.shape[0]
        self.check(end)
        self.keys[layer, :, start:end].copy_(keys.transpose(0, 1))
        self.values[layer, :, start:end].copy_(values.transpose(0, 1))
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def check(self, end: int) -> None:
        """Raise IndexError where positions up to `end` - 1 do not fit."""
        if end > self.capacity:
            raise IndexError(f"position {end - 1} lies beyond a KV cache of {self.capacity}")

    def fork(self, below: int | None = None) -> KVCache:
        """A copy that goes its own way; of the layers before `below` only, where it is given."""
        layers, kv_heads, _, head_dim = self.keys.shape
        twin = KVCache(layers, kv_heads, head_dim, self.capacity, self.keys.device, self.keys.dtype)
        twin.keys[:below, :, : self.length].copy_(self.keys[:below, :, : self.length])
        twin.values[:below, :, : self.length].copy_(self.values[:below, :, : self.length])
        twin.length = self.length
        return twin
