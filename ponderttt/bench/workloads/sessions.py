"""Sessions that learn while they are served, against a PEFT loop that takes them in turn."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.bench.driving import greedy, mean_loss, timed_run
from ponderttt.bench.lab import Lab
from ponderttt.bench.peft_peer import Learns, PeftLoop
from ponderttt.bench.texts import Prompt, Rounds
from ponderttt.bench.workload import Comparison, Sample, Side, Target
from ponderttt.engine.core import EngineCore
from ponderttt.fast_weights.layout import AdapterLayout

#: Of a round's requests the loop takes the first two: one after another, more of them change the
#: time and the tokens alike.
_LOOP_REQUESTS = 2


def _comparisons(what: str, target: Target) -> tuple[Comparison, ...]:
    return (
        Comparison(what, "PEFT loop, LoRA on all blocks", "ours", "full", target),
        Comparison(what, "PEFT loop, LoRA where ours sits", "ours", "same place", target),
    )


class _Sessions:
    """New sessions at once: tokens generated per second, reads, writes and decoding together."""

    unit = "new tokens/s"

    def __init__(
        self, name: str, count: int, prompt: int, new: int, chunk: int, learns: Learns
    ) -> None:
        self._name, self._count = name, count
        self._prompt, self._new, self._chunk, self._learns = prompt, new, chunk, learns

    def open(self, lab: Lab, stack: ExitStack) -> Mapping[str, Side]:
        """Ours, and the loop with LoRA at both places; the extra figure is the loss."""
        work = lab.pick(self, _Sessions(self._name, self._count, 64, 33, 32, self._learns))
        return work._sides(lab)

    def _sides(self, lab: Lab) -> Mapping[str, Side]:
        core = lab.core(max_num_seqs=self._count, lora=lab.lora)
        rounds = lab.rounds(self._name, self._count, self._prompt)
        full = PeftLoop.full_depth(lab.path)
        layout = AdapterLayout(lab.decoder, lab.lora)
        rule = replace(lab.rule, optimizer="adam")
        same = PeftLoop.where_ours_sits(lab.path, lab.decoder, layout, rule)
        return {
            "ours": lambda number: self._ours(core, rounds, number),
            "full": lambda number: self._loop(full, rounds, number),
            "same place": lambda number: self._loop(same, rounds, number),
        }

    def _ours(self, core: EngineCore, rounds: Rounds, number: int) -> Sample:
        prompts = rounds[number]
        names = [f"{self._name}-{number}-{index}" for index in range(len(prompts))]
        sessions = [core.sessions.create(name, TTTParams()) for name in names]

        def forget() -> None:
            # What repeats itself is learned again, as the loop does: else we would save its steps.
            for session in sessions:
                session.learned.clear()

        requests = [
            greedy(prompt, self._new, self._ttt(name))
            for name, prompt in zip(names, prompts, strict=True)
        ]
        seconds, heard = timed_run(core, requests, forget)
        for name in names:
            core.delete_session(name)
        rate = len(prompts) * self._new / seconds
        losses = [pair for one in heard[:_LOOP_REQUESTS] for pair in one.losses]
        return Sample(rate, _extra(losses, len(prompts)))

    def _ttt(self, name: str) -> TTTParams:
        return TTTParams(
            session=name,
            action=Action.UPDATE_1,
            chunk_size=self._chunk,
            adapt_on=self._learns,
            when="inline",
            # As the loop's adapters do.
            read="session",
        )

    def _loop(self, loop: PeftLoop, rounds: Rounds, number: int) -> Sample:
        prompts: list[Prompt] = rounds[number][:_LOOP_REQUESTS]
        begun = time.perf_counter()
        outcomes = [loop.run(p, self._new, self._chunk, self._learns) for p in prompts]
        seconds = time.perf_counter() - begun
        losses = [pair for outcome in outcomes for pair in outcome.losses]
        rate = len(prompts) * self._new / seconds
        return Sample(rate, _extra(losses, len(prompts)))


def _extra(losses: list[tuple[int, float]], requests: int) -> dict[str, float]:
    """Requests taken; of the first two the chunks learned and their mean loss before it."""
    loss = {"loss": mean_loss(losses)} if losses else {}
    return {"requests": requests, "chunks": len(losses), **loss}


class PromptHeavy(_Sessions):
    """Prompts of 1,024 tokens, each learned by chunks of 256; 128 new tokens."""

    name = "prompt-heavy-8"
    comparisons = _comparisons("8 sessions, prompt-heavy", Target(2.5, 3.5))

    def __init__(self) -> None:
        super().__init__(self.name, 8, 1024, 128, 256, "prompt")


class GenerationHeavyEight(_Sessions):
    """Prompts of 128 tokens; 256 new tokens, learned by chunks of 64."""

    name = "generation-heavy-8"
    comparisons = _comparisons("8 sessions, generation-heavy", Target(4.5, 6.5))

    def __init__(self) -> None:
        super().__init__(self.name, 8, 128, 256, 64, "generated")


class GenerationHeavySixteen(_Sessions):
    """The same with sixteen sessions; the goal is RW-TTT's figure (arXiv:2605.28053)."""

    name = "generation-heavy-16"
    comparisons = _comparisons("16 sessions, generation-heavy", Target(6.0, 9.31))

    def __init__(self) -> None:
        super().__init__(self.name, 16, 128, 256, 64, "generated")
