"""Linear layers with room for an adapter, norms, rotary positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ponderttt.models.product import FrozenMatrix


class Adapter(Protocol):
    """What may be added to the output of a linear projection, row by row.

    Rows of different owners may share a batch; the adapter knows which row is whose.
    """

    def delta(self, layer: int, module: str, x: Tensor) -> Tensor | None:
        """[N, in] → [N, out] to add to the output of `module` in block `layer`; None: nothing."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """One projection of a fused linear layer: its name in the checkpoint and its sizes."""

    name: str
    in_features: int
    out_features: int


class FusedLinear:
    """Projections of the same input in one matrix product.

    Args:
        parts: the projections, in the order of the rows.
        matrix: [out, in], out the sum over the parts.
        bias: [out] or None.
    """

    def __init__(self, parts: tuple[Part, ...], matrix: FrozenMatrix, bias: Tensor | None) -> None:
        self.parts = parts
        self.matrix = matrix
        self.bias = bias
        self._sizes = [part.out_features for part in parts]

    def __call__(
        self, x: Tensor, layer: int, adapter: Adapter | None, *, coded: bool = False
    ) -> tuple[Tensor, ...]:
        """[N, in] → one [N, out] per part, the adapter's delta added where there is one.

        `coded` as of `FrozenMatrix`.
        """
        outputs = self._split(self.matrix(x, self.bias, coded=coded))
        if adapter is None:
            return outputs
        deltas = (adapter.delta(layer, part.name, x) for part in self.parts)
        return tuple(
            out if delta is None else out + delta
            for out, delta in zip(outputs, deltas, strict=True)
        )

    def joined(
        self, x: Tensor, layer: int, adapter: Adapter | None, *, coded: bool = False
    ) -> Tensor:
        """As a call, the parts side by side: [N, in] → [N, out]."""
        if adapter is None:
            return self.matrix(x, self.bias, coded=coded)
        deltas = [adapter.delta(layer, part.name, x) for part in self.parts]
        whole = self.matrix(x, self.bias, coded=coded)
        if all(delta is None for delta in deltas):
            return whole
        parts = zip(self._split(whole), deltas, strict=True)
        return torch.cat([out if delta is None else out + delta for out, delta in parts], dim=-1)

    def _split(self, whole: Tensor) -> tuple[Tensor, ...]:
        # Not `Tensor.split`, whose way through Python takes longer than all else here.
        return (whole,) if len(self.parts) == 1 else torch.split_with_sizes(whole, self._sizes, -1)


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Root-mean-square norm (Zhang & Sennrich, arXiv:1910.07467); weight [hidden]."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Layer norm; weight and bias [hidden]."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Rotary:
    """Rotary position embedding in the half-split layout (Su et al., arXiv:2104.09864).

    Args:
        inv_freq: [head_dim / 2].
        scale: factor on cos and sin (YaRN's attention factor).
        max_positions: rows of the tables.
    """

    def __init__(
        self,
        inv_freq: Tensor,
        scale: float,
        max_positions: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * inv_freq[None, :]
        # The sine's sign is that of the half it falls on: see `rotate`.
        cos = torch.cat((angles.cos(), angles.cos()), dim=-1)[:, None, :]
        sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)[:, None, :]
        self.cos = (cos * scale).to(device=device, dtype=dtype)
        self.sin = (sin * scale).to(device=device, dtype=dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[N] positions → cos and sin, each [N, 1, head_dim]."""
        return self.cos[positions], self.sin[positions]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions, as of `Rotary.at`, to [N, heads, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos).addcmul_(torch.cat((second, first), dim=-1), sin)


def activated(parts: tuple[Tensor, ...], kind: str) -> Tensor:
    """The MLP's activation of (gate, up), or of (up,) where it is not gated, each [N, inner].

    Args:
        parts: outputs of the MLP's first layer.
        kind: as in `ModelConfig.activation`.
    """
    match kind:
        case "silu":
            gate = F.silu(parts[0])
        case "gelu_tanh":
            gate = F.gelu(parts[0], approximate="tanh")
        case "gelu":
            gate = F.gelu(parts[0])
        case _:
            gate = F.relu(parts[0])
    return gate * parts[1] if len(parts) == 2 else gate
