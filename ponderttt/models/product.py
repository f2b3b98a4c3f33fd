"""Products with a frozen matrix, which is most of what a decoder does.

BLAS reads the matrix as it lies, and at 1 to 100 rows reaches a quarter to two thirds of what the
memory gives. So on the CPU the matrix is kept in a second layout as well, the one that oneDNN's
kernels read in order: 1.1 to 2 times faster at 3 rows and more than what there is without it, and
a row's result does not depend on the rows beside it. One or two rows are fastest as a batched
product over slices of the matrix. Where the weights were decoded from a quantised file, their codes
are kept as well, for decoding: see `ponderttt.models.native`.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ponderttt.models.native.coded_matrix import CodedMatrix

# oneDNN keeps the kernel of every number of rows it has met, about half a megabyte each, a thousand
# of them in each of two caches. Making one anew takes less than a millisecond. Read at first use.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "128")

# More rows than this are a matter of arithmetic, and BLAS is good at that.
_NARROW = 192

# So few rows are a matter of reading the matrix once; the batched product is best at that.
_FEW = 2

# Slices of the matrix; with fewer, some numbers of rows fall back to a slow kernel.
_SLICES = 8


class FrozenMatrix:
    """A matrix that never changes, in the layouts in which products with it are fast.

    Args:
        weight: [out, in], contiguous.
        packed: keep a second copy in oneDNN's layout, where that helps (float32 on a CPU); a third,
            for `back`, is made when it is first needed.
        native: keep its codes, where it has some and there are kernels for them.
    """

    def __init__(self, weight: Tensor, *, packed: bool = True, native: bool = False) -> None:
        self.weight = weight
        self.codes = CodedMatrix.of(weight) if native else None
        self._may_pack = packed and can_pack(weight)
        self._packed = _pack(weight) if self._may_pack else None
        self._packed_back: Tensor | None = None

    @property
    def packed_bytes(self) -> int:
        """What the further layouts take now."""
        copies = (self._packed, self._packed_back)
        return sum(self.weight.nbytes for copy in copies if copy is not None)

    @property
    def code_bytes(self) -> int:
        """What the codes take; 0 without."""
        return 0 if self.codes is None else self.codes.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None = None, *, coded: bool = False) -> Tensor:
        """`x @ weight.T + bias`, differentiable in x: [N, in] → [N, out], out of `bias` [out].

        A few rows may come back as the transpose of a contiguous matrix.

        Args:
            coded: read the codes, if there are any and x needs no gradient: right for few rows.
                The last bits may differ from those without.
        """
        differentiated = x.requires_grad and torch.is_grad_enabled()
        if coded and self.codes is not None and not differentiated:
            return self.codes(x, bias)
        if self._packed is None:
            return _unpacked(x, self.weight, bias)
        if differentiated:
            found: Tensor = _Packed.apply(x, self, bias)  # type: ignore[no-untyped-call]
            return found
        return self._forward(x, bias)

    def back(self, gradient: Tensor) -> Tensor:
        """`gradient @ weight`: [N, out] → [N, in]. Not differentiable."""
        if not self._may_pack:
            return gradient.detach().to(self.weight.dtype) @ self.weight
        if self._packed_back is None:
            self._packed_back = _pack(self.weight.t())
        return _times(gradient.detach(), self._packed_back, None)

    def _forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._packed is None or (x.shape[0] <= _FEW and not self.weight.shape[0] % _SLICES):
            return _unpacked(x, self.weight, bias)
        return _times(x, self._packed, bias)


class _Packed(torch.autograd.Function):
    """Both directions in the packed layout; the operator itself has no derivative."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, matrix: FrozenMatrix, bias: Tensor
    ) -> Tensor:
        ctx.matrix = matrix  # type: ignore[attr-defined]
        return matrix._forward(x, bias)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, None, None]:
        return ctx.matrix.back(gradient), None, None  # type: ignore[attr-defined]


def can_pack(weight: Tensor) -> bool:
    """Whether there is a faster layout of it here: float32, on a CPU, with oneDNN in torch."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _pack(weight: Tensor) -> Tensor:
    # A write's backward pass uses it, which may not take what inference mode made.
    with torch.inference_mode(False), torch.no_grad():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def _times(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return found


def _unpacked(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, (out, width) = x.shape[0], weight.shape
    if rows > _NARROW or out % _SLICES or x.device.type != "cpu" or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    slices = weight.view(_SLICES, out // _SLICES, width)
    found = torch.bmm(slices, x.t().expand(_SLICES, -1, -1)).view(out, rows).t()
    return found if bias is None else found + bias
