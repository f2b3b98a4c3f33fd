"""Muon: momentum that is orthogonalised matrix by matrix, vectorised over owners.

Jordan et al., https://kellerjordan.github.io/posts/muon/; the scale of the step is that of Liu et
al., arXiv:2502.16982, section 2.2, with which a learning rate for Adam fits. The figures are those
of `torch.optim.Muon`, which this follows except that nothing is rounded to bfloat16.
"""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import chain

import torch
from torch import Tensor

from ponderttt.fast_weights.layout import AdapterLayout

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPS = 1e-7
#: Root mean square of an element of Adam's step, as a share of its learning rate.
_ADAM_RMS = 0.2


def muon_rows(
    layout: AdapterLayout,
    weights: Tensor,
    gradients: Tensor,
    first: Tensor,
    learning_rates: Tensor,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """One Muon step, with Nesterov momentum, of each A and each B of each row.

    Args:
        layout: of the rows.
        weights, gradients, first: [N, P]; `first` is the momentum, zero before the first step.
        learning_rates: [N].
        momentum: share of the momentum that is kept.
    Returns:
        New weights and momentum; the arguments are left as they are.
    """
    first = torch.lerp(first, gradients, 1 - momentum)
    steps = torch.lerp(gradients, first, momentum)
    by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for matrix in chain.from_iterable(layout.views(steps).values()):
        # The factors commute with transposition, and the Gram matrix of a wide one is small.
        wide = matrix if matrix.shape[1] <= matrix.shape[2] else matrix.transpose(1, 2)
        by_shape[wide.shape].append(wide)
    for (_, _, width), matrices in by_shape.items():
        directions = orthogonalise(torch.cat(matrices)) * (_ADAM_RMS * math.sqrt(width))
        for matrix, direction in zip(matrices, directions.chunk(len(matrices)), strict=True):
            matrix.copy_(direction)
    return weights - learning_rates[:, None] * steps, first


def orthogonalise(matrices: Tensor) -> Tensor:
    """[M, R, C], R ≤ C, with all singular values brought near 1 by Newton–Schulz iterations.

    The quintic's coefficients are chosen for speed: the values end up in about [0.7, 1.2], those
    below a thousandth of the matrix's norm lower. A matrix of zeros remains one.
    """
    a, b, c = _COEFFICIENTS
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
