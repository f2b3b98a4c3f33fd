"""Running mean and standard deviation of the features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ponderttt.errors import InvalidRequestError

#: As `PolicyGate` clamps what it serves.
LIMIT = 10.0
# Below this a feature counts as a constant: dividing by its noise would only blow that up.
_LEAST_STD = 1e-6


class FeatureNormaliser(nn.Module):
    """(features - mean) / std, clamped to ±10, as `PolicyGate` does it.

    Moments are merged batch by batch in float64 (Chan, Golub, LeVeque, 1979), which is Welford's
    method for many rows at once.

    Args:
        width: F.
        mean, std: start with these, as if seen in `count` rows.
        count: rows that `mean` and `std` stand for.
        frozen: keep them as they are.
    Raises:
        InvalidRequestError: not F finite values, a `std` that is not above 0, or only one of both.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor
    frozen: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        width: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        count: int = 1,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise InvalidRequestError("feature_mean", "needs feature_std, and the other way round")
        given = mean is not None
        centre = _values("feature_mean", mean if mean is not None else [0.0] * width, width)
        spread = _values("feature_std", std if std is not None else [1.0] * width, width)
        if not (spread.float() > 0.0).all():
            raise InvalidRequestError("feature_std", "must be above 0 throughout")
        rows = float(count if given else 0)
        self.register_buffer("count", torch.tensor(rows, dtype=torch.float64))
        self.register_buffer("mean", centre)
        self.register_buffer("squares", spread.square() * rows)
        self.register_buffer("frozen", torch.tensor(frozen))
        self.register_buffer("shift", centre.float())
        self.register_buffer("scale", spread.float())

    @property
    def empty(self) -> bool:
        """Whether nothing has been seen or given yet."""
        return float(self.count) == 0.0

    def freeze(self) -> None:
        """Keep mean and std as they are from now on."""
        self.frozen.fill_(True)

    def update(self, features: Tensor) -> None:
        """Take in [..., F] raw features; nothing happens where frozen."""
        if self.frozen:
            return
        rows = features.detach().reshape(-1, features.shape[-1]).double()
        mean, count = rows.mean(0), float(len(rows))
        total = self.count + count
        gap = mean - self.mean
        self.squares += (rows - mean).square().sum(0) + gap.square() * (self.count * count / total)
        self.mean += gap * (count / total)
        self.count.copy_(total)
        std = (self.squares / total).sqrt()
        self.shift.copy_(self.mean)
        self.scale.copy_(torch.where(std > _LEAST_STD, std, torch.ones_like(std)))

    def forward(self, features: Tensor) -> Tensor:
        """[..., F] raw → [..., F] normalised."""
        return ((features - self.shift) / self.scale).clamp(-LIMIT, LIMIT)

    @property
    def feature_mean(self) -> tuple[float, ...]:
        """F values for `PolicyMetadata`."""
        return tuple(self.shift.tolist())

    @property
    def feature_std(self) -> tuple[float, ...]:
        """F values for `PolicyMetadata`."""
        return tuple(self.scale.tolist())


def _values(param: str, values: Sequence[float], width: int) -> Tensor:
    tensor = torch.tensor(list(values), dtype=torch.float64)
    if tensor.shape != (width,) or not tensor.isfinite().all():
        raise InvalidRequestError(param, f"must be {width} finite numbers")
    return tensor
