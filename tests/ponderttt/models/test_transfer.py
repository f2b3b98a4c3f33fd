"""Copies to the model's device. No GPU is at hand: the way to one is followed, not gone."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ponderttt.models.transfer import moved, tensor_on

CPU = torch.device("cpu")


def test_values_become_what_torch_makes_of_them() -> None:
    for values in ([1, 2, 3], [0.5, -1.0], [True, False]):
        found = tensor_on(CPU, values)
        assert torch.equal(found, torch.tensor(values))
        assert found.dtype == torch.tensor(values).dtype
    assert tensor_on(CPU, [1, 2], torch.float64).dtype == torch.float64


def test_what_is_there_already_is_not_copied() -> None:
    x = torch.arange(3)
    assert moved(x, CPU) is x


class OnHost:
    """Stands for a tensor on the CPU and notes what is done to it."""

    device = CPU

    def __init__(self) -> None:
        self.steps: list[object] = []

    def pin_memory(self) -> OnHost:
        self.steps.append("pinned")
        return self

    def to(self, device: torch.device, *, non_blocking: bool = False) -> OnHost:
        self.steps.append((device, non_blocking))
        return self


def test_way_to_a_gpu_is_pinned_and_does_not_wait() -> None:
    host, gpu = OnHost(), torch.device("cuda", 0)
    moved(cast(Tensor, host), gpu)
    assert host.steps == ["pinned", (gpu, True)]
