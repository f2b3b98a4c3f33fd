"""Every row of the table, in its order."""

from __future__ import annotations

from ponderttt.bench.workload import Workload
from ponderttt.bench.workloads.decoding import (
    DecodeDifferent,
    DecodeOne,
    DecodeSixteen,
    Prefill,
)
from ponderttt.bench.workloads.latency import BackgroundFirstToken, DecodeDuringWrite, SeenPrompt
from ponderttt.bench.workloads.memory import IdleSession
from ponderttt.bench.workloads.sessions import (
    GenerationHeavyEight,
    GenerationHeavySixteen,
    PromptHeavy,
)
from ponderttt.bench.workloads.writing import Actions, BatchedWrite, FeaturesAndGate

ALL: tuple[Workload, ...] = (
    DecodeOne(),
    DecodeSixteen(),
    Prefill(),
    PromptHeavy(),
    GenerationHeavyEight(),
    GenerationHeavySixteen(),
    BatchedWrite(),
    Actions(),
    FeaturesAndGate(),
    SeenPrompt(),
    DecodeDuringWrite(),
    BackgroundFirstToken(),
    DecodeDifferent(),
    IdleSession(),
)
