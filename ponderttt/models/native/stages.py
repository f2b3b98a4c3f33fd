"""What a block does between its matrix products, by kernels in C."""

from __future__ import annotations

import torch
from torch import Tensor

from ponderttt.models.layers import RMSNorm
from ponderttt.models.native import elementwise
from ponderttt.models.stages import Norm, Stages


class NativeStages(Stages):
    """As `Stages`, whose operations it falls back on for what the kernels don't take."""

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """As of `Stages`, by the kernel of the sums: with and without an adapter, to the bit."""
        if not (isinstance(norm, RMSNorm) and elementwise.takes(x)):
            return super().norm(x, norm)
        return self.add_norm(x, torch.zeros_like(x), norm)[1]

    def add_norm(self, x: Tensor, delta: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """As of `Stages`."""
        if isinstance(norm, RMSNorm) and elementwise.takes(x):
            delta = _in_rows(delta)
            if elementwise.takes(delta):
                return elementwise.add_rms_norm(x, delta, norm.weight, norm.eps)
        return super().add_norm(x, delta, norm)

    def rotate(self, heads: Tensor, count: int, cos: Tensor, sin: Tensor) -> Tensor:
        """As of `Stages`, but in place where the rows allow it."""
        turning = _in_rows(heads[:, :count])
        if not elementwise.can_rotate(turning):
            return super().rotate(turning, count, cos, sin)
        return elementwise.rotate_(turning, cos, sin)

    def activate(self, parts: tuple[Tensor, ...]) -> Tensor:
        """As of `Stages`."""
        # Not `_in_rows`: copies of what is this wide take longer than the kernel saves.
        gated_silu = self._activation == "silu" and len(parts) == 2
        if not (gated_silu and all(elementwise.takes(part) for part in parts)):
            return super().activate(parts)
        return elementwise.silu_gate(*parts)


def _in_rows(x: Tensor) -> Tensor:
    """x, copied where a row is not in one piece, as `FrozenMatrix` may return a few of them."""
    return x if x.stride(-1) == 1 else x.contiguous()
