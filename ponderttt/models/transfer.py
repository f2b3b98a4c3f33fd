"""Copies from the host to where the model is.

To a CUDA device they go from page-locked memory, so that the host need not wait for them: it goes
on launching kernels, which run in the copies' stream and hence after them. PyTorch keeps the memory
until the copy is done, and then for the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tensor_on(
    device: torch.device, values: Sequence[int] | Sequence[float], dtype: torch.dtype | None = None
) -> Tensor:
    """As `torch.tensor(values, dtype=dtype, device=device)`."""
    return moved(torch.tensor(values, dtype=dtype), device)


def settle(device: torch.device) -> None:
    """Wait until a GPU has done what was launched: else a clock tells of the launches alone."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; itself where it is there already."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
