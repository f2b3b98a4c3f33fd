"""Products of a few rows with a large frozen matrix, which is what decoding consists of.

One row needs every weight once, so the memory's speed is the limit. BLAS reaches half of it or
less where a matrix product has 1 to 100 rows; PyTorch's batched product over slices of the matrix
comes near, with one copy of the weights that suits long products as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# More rows than this are a matter of arithmetic, and BLAS is good at that.
_NARROW = 192

# Slices of the matrix; with fewer, some numbers of rows fall back to a slow kernel.
_SLICES = 8


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, as `torch.nn.functional.linear` gives it.

    Differentiable in x. A few rows come back as the transpose of a contiguous matrix.

    Args:
        x: [N, in].
        weight: [out, in], contiguous.
        bias: [out] or None.
    Returns:
        [N, out].
    """
    rows, (out, width) = x.shape[0], weight.shape
    if rows > _NARROW or out % _SLICES or x.device.type != "cpu" or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    slices = weight.view(_SLICES, out // _SLICES, width)
    found = torch.bmm(slices, x.t().expand(_SLICES, -1, -1)).view(out, rows).t()
    return found if bias is None else found + bias
