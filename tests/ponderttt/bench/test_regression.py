"""Speed that must not be lost: ratios within one run on the real model, with generous margins.

Times say nothing on a machine that others share, and single ratios little: bounds lie far below
what `ponderttt bench engine` measures (README), and one of a few rounds has to reach them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from ponderttt.bench.lab import Lab, open_lab
from ponderttt.bench.workload import Workload
from ponderttt.bench.workloads.decoding import DecodeOne, DecodeSixteen, Prefill
from ponderttt.bench.workloads.latency import SeenPrompt
from ponderttt.bench.workloads.writing import Actions, BatchedWrite, FeaturesAndGate

pytestmark = pytest.mark.real_model

_ROUNDS = 3
# Without kernels both sides are the same; with a CPU and a compiler for them, there must be some.
_KERNELS = torch.backends.cpu.get_cpu_capability() == "AVX512" and shutil.which("gcc") is not None


@pytest.fixture(scope="module")
def real_lab(smollm2_dir: Path) -> Iterator[Lab]:
    threads = min(2, torch.get_num_threads())
    with open_lab(str(smollm2_dir), threads=threads, quick=False) as opened:
        yield opened


@pytest.mark.parametrize(
    ("workload", "ours", "theirs", "better", "bound"),
    [
        (DecodeOne(), "ours", "hf", "higher", 1.1),
        (DecodeOne(), "ours", "plain", "higher", 1.2 if _KERNELS else 0.7),
        (DecodeSixteen(), "ours", "plain", "higher", 1.1 if _KERNELS else 0.7),
        (Prefill(), "ours", "hf", "higher", 0.8),
        (BatchedWrite(), "batched, 64", "single, 64", "higher", 1.0),
        (Actions(), "UPDATE_1", "SKIP", "lower", 2.8),
        (FeaturesAndGate(), "gate", "forward", "lower", 0.015),
        (SeenPrompt(), "seen", "cold", "lower", 0.6),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else "",
)
def test_ratio_is_not_lost(
    workload: Workload, ours: str, theirs: str, better: str, bound: float, real_lab: Lab
) -> None:
    ratios = []
    with ExitStack() as stack:
        sides = workload.open(real_lab, stack)
        for number in range(_ROUNDS + 1):
            one, other = sides[ours](number).value, sides[theirs](number).value
            if number:  # the first one warms up
                ratios.append(one / other)
                if (ratios[-1] >= bound) if better == "higher" else (ratios[-1] <= bound):
                    return
    raise AssertionError(f"{ratios}: none reaches {bound}")
