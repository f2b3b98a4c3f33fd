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
        return self.add_norm(x, torch.zeros_like(x), norm)[1]

    def add_norm(self, x: Tensor, delta: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """As of `Stages`."""
        if not (isinstance(norm, RMSNorm) and elementwise.takes(x) and elementwise.takes(delta)):
            return super().add_norm(x, delta, norm)
        return elementwise.add_rms_norm(x, delta, norm.weight, norm.eps)

    def rotate(self, heads: Tensor, count: int, cos: Tensor, sin: Tensor) -> Tensor:
        """As of `Stages`, but in place."""
        turning = heads[:, :count]
        if not elementwise.can_rotate(turning):
            return super().rotate(heads, count, cos, sin)
        return elementwise.rotate_(turning, cos, sin)

    def activate(self, parts: tuple[Tensor, ...]) -> Tensor:
        """As of `Stages`."""
        gated_silu = self._activation == "silu" and len(parts) == 2
        if not (gated_silu and all(elementwise.takes(part) for part in parts)):
            return super().activate(parts)
        return elementwise.silu_gate(*parts)
