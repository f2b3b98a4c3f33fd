"""Adding fast weights to the projections of a flat batch whose rows have different owners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ponderttt.models.transfer import tensor_on

Matrices = Mapping[tuple[int, str], tuple[Tensor, Tensor]]


class BatchedAdapter:
    """LoRA deltas for a flat batch; segment i of the rows uses slot `slots[i]`.

    Differentiable in the matrices, so reads and writes share it.

    Args:
        matrices: (A [S, R, in], B [S, out, R]) by (layer, module).
        slots: slot of each segment.
        lengths: rows of each segment.
        scale: alpha / rank.
    """

    def __init__(
        self, matrices: Matrices, slots: Sequence[int], lengths: Sequence[int], scale: float
    ) -> None:
        self._matrices = matrices
        self._slots = list(slots)
        self._lengths = list(lengths)
        self._scale = scale
        self._one_owner = len(set(slots)) == 1
        self._even = len(set(lengths)) == 1
        first = next(iter(matrices.values()))[0]
        # All slots in order need no gather; that is how a write calls it.
        self._in_order = self._slots == list(range(first.shape[0]))
        self._index = tensor_on(first.device, self._slots)

    def delta(self, layer: int, module: str, x: Tensor) -> Tensor | None:
        """[N, in] → [N, out], or None where the module does not adapt."""
        found = self._matrices.get((layer, module))
        if found is None:
            return None
        a, b = found
        if self._one_owner:
            slot = self._slots[0]
            return _low_rank(x, a[slot], b[slot], self._scale)
        if self._even:
            if not self._in_order:
                a, b = a[self._index], b[self._index]
            segments = x.view(len(self._slots), self._lengths[0], -1)
            return _low_rank(segments, a, b, self._scale).flatten(0, 1)
        pieces = zip(x.split(self._lengths), self._slots, strict=True)
        return torch.cat([_low_rank(rows, a[slot], b[slot], self._scale) for rows, slot in pieces])


def _low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    delta = (x.to(a.dtype) @ a.transpose(-1, -2) * scale) @ b.transpose(-1, -2)
    return delta.to(x.dtype)
