"""Plain serving: decode and prefill without adaptation, and decode with many fast weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

import torch

from ponderttt.adaptation.params import TTTParams
from ponderttt.bench.driving import PhaseTimes, greedy, run, taught, timed_run
from ponderttt.bench.hf_peer import HuggingFace
from ponderttt.bench.lab import Lab
from ponderttt.bench.workload import Comparison, Sample, Side, Target
from ponderttt.models.decoder import Decoder

_PROMPT = 32


class DecodeOne:
    """One stream, prompt of 32 tokens: new tokens per second, the prompt's read included."""

    name = "decode-1"
    unit = "tokens/s"
    comparisons = (
        Comparison("decode, 1 stream", "vLLM", "ours", "vllm", Target(1.4, 2.0)),
        Comparison("decode, 1 stream", "Hugging Face generate", "ours", "hf", Target(1.4, 2.0)),
        Comparison(
            "decode, 1 stream",
            "what a step reads of the weights, at the rate of memory",
            "ours",
            "memory",
            Target(None, 0.6),
        ),
        Comparison("decode, 1 stream", "ours without native kernels", "ours", "plain", Target()),
    )

    def open(self, lab: Lab, stack: ExitStack) -> Mapping[str, Side]:
        """Ours, vLLM, Hugging Face, and the rate at which memory can deliver the weights."""
        new = lab.pick(128, 8)
        rounds, core = lab.rounds(self.name, 1, _PROMPT), lab.core()
        without = lab.core(native_kernels=False)
        peer = HuggingFace(lab.path)
        memory = torch.ones(lab.pick(1 << 27, 1 << 22))
        per_token = read_bytes(lab.decoder)

        def ours(number: int) -> Sample:
            seconds, _ = timed_run(core, [greedy(rounds[number][0], new)])
            return Sample(new / seconds)

        def plain(number: int) -> Sample:
            seconds, _ = timed_run(without, [greedy(rounds[number][0], new)])
            return Sample(new / seconds)

        def hf(number: int) -> Sample:
            begun = time.perf_counter()
            peer.generate(rounds[number][0], new)
            return Sample(new / (time.perf_counter() - begun))

        def vllm(number: int) -> Sample:
            seconds, _ = lab.vllm.generate(rounds[number], new)
            return Sample(new / seconds)

        def bandwidth(_: int) -> Sample:
            seconds = []
            for _turn in range(3):  # on a shared machine one alone says little
                begun = time.perf_counter()
                memory.sum()
                seconds.append(time.perf_counter() - begun)
            rate = memory.numel() * memory.element_size() / min(seconds)
            return Sample(rate / per_token, {"GB/s": rate / 1e9})

        return {"ours": ours, "hf": hf, "vllm": vllm, "memory": bandwidth, "plain": plain}


class DecodeSixteen:
    """Sixteen streams at once, otherwise the same."""

    name = "decode-16"
    unit = "tokens/s"
    comparisons = (
        Comparison("decode, 16 streams", "vLLM", "ours", "vllm", Target(1.6, 2.5)),
        Comparison("decode, 16 streams", "ours without native kernels", "ours", "plain", Target()),
    )

    def open(self, lab: Lab, stack: ExitStack) -> Mapping[str, Side]:
        """Ours, with and without native kernels, and vLLM."""
        new = lab.pick(64, 4)
        rounds, core = lab.rounds(self.name, 16, _PROMPT), lab.core(max_num_seqs=16)
        without = lab.core(max_num_seqs=16, native_kernels=False)

        def ours(number: int) -> Sample:
            seconds, _ = timed_run(core, [greedy(prompt, new) for prompt in rounds[number]])
            return Sample(16 * new / seconds)

        def plain(number: int) -> Sample:
            seconds, _ = timed_run(without, [greedy(prompt, new) for prompt in rounds[number]])
            return Sample(16 * new / seconds)

        def vllm(number: int) -> Sample:
            seconds, _ = lab.vllm.generate(rounds[number], new)
            return Sample(16 * new / seconds)

        return {"ours": ours, "vllm": vllm, "plain": plain}


class Prefill:
    """A prompt of 2,048 tokens up to its first new token."""

    name = "prefill-2048"
    unit = "tokens/s"
    comparisons = (
        Comparison("prefill of 2,048 tokens", "Hugging Face", "ours", "hf", Target(1.0, 1.3)),
    )

    def open(self, lab: Lab, stack: ExitStack) -> Mapping[str, Side]:
        """Ours and Hugging Face's forward."""
        length = lab.pick(2048, 128)
        rounds, core = lab.rounds(self.name, 1, length), lab.core()
        peer = HuggingFace(lab.path)

        def ours(number: int) -> Sample:
            seconds, _ = timed_run(core, [greedy(rounds[number][0], 1)])
            return Sample(length / seconds)

        def hf(number: int) -> Sample:
            begun = time.perf_counter()
            peer.first_token(rounds[number][0])
            return Sample(length / (time.perf_counter() - begun))

        return {"ours": ours, "hf": hf}


class DecodeDifferent:
    """A decode step of 16 streams, each with fast weights of its own or all with the same."""

    name = "decode-different"
    unit = "s/step"
    comparisons = (
        Comparison(
            "a decode step of 16 streams with different fast weights",
            "the same fast weights",
            "different",
            "same",
            Target(1.25, 1.1, "lower"),
        ),
        Comparison(
            "a decode step of 16 streams with different fast weights",
            "no fast weights",
            "different",
            "none",
            Target(better="lower"),
        ),
    )

    def open(self, lab: Lab, stack: ExitStack) -> Mapping[str, Side]:
        """Sessions that have learned different texts, one of them for all, or none."""
        new = lab.pick(32, 4)
        rounds, core = lab.rounds(self.name, 16, _PROMPT), lab.core(max_num_seqs=16)
        lessons = lab.stream(f"{self.name}/lessons")
        names = [taught(core, f"session-{i}", lessons.take(64)) for i in range(16)]

        def measured(number: int, sessions: list[str | None]) -> Sample:
            core.observer = phases = PhaseTimes()
            pairs = zip(rounds[number], sessions, strict=True)
            reads = TTTParams(gate="off", read="session")
            run(core, [greedy(p, new, replace(reads, session=s)) for p, s in pairs])
            return Sample(statistics.median(phases.seconds("decode", 16)))

        return {
            "different": lambda number: measured(number, list(names)),
            "same": lambda number: measured(number, [names[0]] * 16),
            "none": lambda number: measured(number, [None] * 16),
        }


def read_bytes(model: Decoder) -> int:
    """Bytes that a decode step reads of the blocks and the output matrix: codes, or weights."""
    linears = [linear for block in model.blocks for linear in block.linears()]
    matrices = [linear.matrix for linear in linears] + [model.head]
    return sum(matrix.code_bytes or matrix.weight.nbytes for matrix in matrices)
