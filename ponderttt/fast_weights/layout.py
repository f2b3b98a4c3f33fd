"""Where each LoRA matrix lies in the flat vector that holds one session's fast weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ponderttt.errors import InvalidRequestError
from ponderttt.models.decoder import Decoder

MAX_RANK = 256


@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """Which projections adapt, and with what rank (Hu et al., arXiv:2106.09685).

    Args:
        rank: R.
        alpha: the delta is scaled by alpha / rank.
        layers: number of top blocks that adapt; None: a quarter of the model, rounded up.
        targets: `mlp`, `all`, or names such as `q_proj` (the last component of the module).
        seed: of A's initial values; the same for every session of a server.
    """

    rank: int = 8
    alpha: float = 16.0
    layers: int | None = None
    targets: str | tuple[str, ...] = "mlp"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise InvalidRequestError("rank", f"{self.rank} lies outside [1, {MAX_RANK}]")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InvalidRequestError("alpha", f"{self.alpha} must be finite and above 0")

    @property
    def scale(self) -> float:
        """Factor on B·A·x."""
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class Entry:
    """One adapted projection: block, module name inside the block, sizes."""

    layer: int
    module: str
    in_features: int
    out_features: int


class AdapterLayout:
    """The order of all A [R, in] and B [out, R] in one flat vector of P numbers.

    One vector per session makes snapshot, roll-back, norm, optimiser and storage single tensor
    operations; the matrices are views of it.

    Args:
        model: gives the projections and their sizes.
        config: which of them adapt.
    Raises:
        InvalidRequestError: a target or number of blocks that the model does not have.
    """

    def __init__(self, model: Decoder, config: LoRAConfig) -> None:
        self.config = config
        self.model_type = model.config.model_type
        total = model.config.num_layers
        layers = math.ceil(total / 4) if config.layers is None else config.layers
        if not 1 <= layers <= total:
            raise InvalidRequestError("adaptive_layers", f"{layers} lies outside [1, {total}]")
        self.first_layer = total - layers
        self.last_layer = total
        self.entries = tuple(
            Entry(layer, part.name, part.in_features, part.out_features)
            for layer in range(self.first_layer, total)
            for part in model.module_parts(layer)
            if _is_target(part.name, config.targets)
        )
        self._check_targets(model)
        rank = config.rank
        self._sizes = list(
            chain.from_iterable((rank * e.in_features, e.out_features * rank) for e in self.entries)
        )
        self.size = sum(self._sizes)

    def _check_targets(self, model: Decoder) -> None:
        targets = self.config.targets
        names = {part.name.rsplit(".", 1)[-1] for part in model.module_parts(self.first_layer)}
        unknown = set() if targets in ("mlp", "all") else set(_names(targets)) - names
        if unknown or not self.entries:
            raise InvalidRequestError(
                "targets",
                f"{sorted(unknown) or targets!r} names no projection of this model; "
                f"give 'mlp', 'all' or some of {', '.join(sorted(names))}",
            )

    def views(self, flat: Tensor) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
        """[S, P] → (A [S, R, in], B [S, out, R]) by (layer, module), sharing memory.

        Differentiable: one split, so that the gradient comes back as one concatenation.
        """
        rank, slots = self.config.rank, flat.shape[0]
        pieces = iter(flat.split(self._sizes, dim=1))
        return {
            (e.layer, e.module): (
                next(pieces).view(slots, rank, e.in_features),
                next(pieces).view(slots, e.out_features, rank),
            )
            for e in self.entries
        }

    def fresh(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[P] weights that change nothing yet: A as PEFT draws it (Kaiming uniform), B zero."""
        generator = torch.Generator().manual_seed(self.config.seed)
        flat = torch.zeros(1, self.size)
        for a, _ in self.views(flat).values():
            bound = 1.0 / math.sqrt(a.shape[-1])
            a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
        return flat[0].to(device=device, dtype=dtype)


def _names(targets: str | Sequence[str]) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else tuple(targets)


def _is_target(module: str, targets: str | Sequence[str]) -> bool:
    if targets == "all":
        return True
    if targets == "mlp":
        return module.startswith("mlp.")
    return module.rsplit(".", 1)[-1] in _names(targets)
