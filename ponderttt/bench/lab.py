"""What all workloads share: the model on disk and in memory, texts, the size of the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ponderttt.adaptation.calibration import calibration_for
from ponderttt.adaptation.rules import UpdateRule
from ponderttt.bench.texts import Rounds, TextStream
from ponderttt.bench.vllm_peer import VllmPeer
from ponderttt.engine.config import EngineConfig, served_name
from ponderttt.engine.core import EngineCore
from ponderttt.fast_weights.layout import LoRAConfig
from ponderttt.models import store
from ponderttt.models.checkpoint import load_decoder, torch_device, torch_dtype
from ponderttt.models.decoder import Decoder
from ponderttt.models.tokenizer import Tokenizer

T = TypeVar("T")

#: No row asks vLLM for more.
_VLLM_MAX_LEN = 2048


@dataclass(frozen=True, slots=True)
class Lab:
    """One model, ready to be measured.

    Args:
        path: the model's directory; the peers load it by themselves.
        name: under which its calibration is found.
        decoder, tokenizer: ours.
        vllm: starts when it is first asked for something.
        threads: of every side.
        quick: take the small sizes, which show that all works but say nothing of speed.
        seed: of the texts.
    """

    path: Path
    name: str
    decoder: Decoder
    tokenizer: Tokenizer
    vllm: VllmPeer
    threads: int
    quick: bool
    seed: int = 0

    @property
    def lora(self) -> LoRAConfig:
        """The model's calibrated fast weights."""
        return calibration_for(self.name).lora

    @property
    def rule(self) -> UpdateRule:
        """The model's calibrated update rule."""
        return calibration_for(self.name).rule

    def pick(self, full: T, quick: T) -> T:
        """The size to be used."""
        return quick if self.quick else full

    def core(self, **settings: Any) -> EngineCore:
        """A new engine on the shared weights; settings as of `EngineConfig`.

        Without `native_kernels`, on weights of its own.
        """
        settings.setdefault("measure_costs", False)
        config = EngineConfig(**settings)
        rule = config.rule or self.rule
        decoder = self.decoder
        if not config.native_kernels:
            decoder = load_decoder(self.path, decoder.device, decoder.dtype, native=False)
        return EngineCore(decoder, self.tokenizer, self.name, config, rule)

    def stream(self, name: str) -> TextStream:
        """Texts by a name: the same every time, whatever else is measured."""
        return TextStream(self.tokenizer, f"{self.seed}/{name}")

    def rounds(self, name: str, count: int, length: int) -> Rounds:
        """`count` prompts of `length` tokens per round."""
        return Rounds(self.stream(name), count, length)


@contextmanager
def open_lab(
    model: str,
    *,
    threads: int,
    quick: bool,
    seed: int = 0,
    progress: bool = False,
    compiled: bool = False,
    vllm_compiled: bool = False,
) -> Iterator[Lab]:
    """Load a model in float32 on the CPU, limit torch to `threads`, and end the peers afterwards.

    Raises:
        ModelError: the model cannot be had, or not compiled.
    """
    before = torch.get_num_threads()
    path = store.resolve(model, progress=progress)
    decoder = load_decoder(path, torch_device("cpu"), torch_dtype("float32"))
    longest = min(decoder.config.max_positions, _VLLM_MAX_LEN)
    vllm = VllmPeer(path, threads, longest, eager=not vllm_compiled)
    try:
        torch.set_num_threads(threads)
        if compiled:
            # Kernels are for a number of threads.
            decoder.compile()
        yield Lab(
            path=path,
            name=served_name(model),
            decoder=decoder,
            tokenizer=Tokenizer.from_dir(path),
            vllm=vllm,
            threads=threads,
            quick=quick,
            seed=seed,
        )
    finally:
        vllm.close()
        torch.set_num_threads(before)
