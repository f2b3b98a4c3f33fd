"""What learning costs: batched writes, the actions, features and gate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack

import torch

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.features import FEATURE_NAMES, extract
from ponderttt.adaptation.observation import History
from ponderttt.adaptation.observe import ChunkRead, observe, score
from ponderttt.adaptation.params import TTTParams
from ponderttt.adaptation.policy import PolicyGate, PolicyMetadata, PolicyNetwork
from ponderttt.adaptation.update import Write, probabilities_fit, top_gradient
from ponderttt.bench.driving import timed_run
from ponderttt.bench.lab import Lab
from ponderttt.bench.texts import Prompt
from ponderttt.bench.workload import Comparison, Sample, Side, Target
from ponderttt.engine.core import EngineCore
from ponderttt.engine.request import AdaptRequest
from ponderttt.fast_weights.bank import StepTag
from ponderttt.models.kv_cache import KVCache

_SESSIONS = 8


class BatchedWrite:
    """UPDATE_1 on a chunk of each of 8 sessions: at once, or one session after the other."""

    name = "write-8"
    unit = "writes/s"
    comparisons = (
        Comparison(
            "a batched write for 8 sessions, chunks of 256",
            "8 single writes",
            "batched",
            "single",
            Target(1.3, 2.0),
        ),
        Comparison(
            "a batched write for 8 sessions, chunks of 64",
            "8 single writes",
            "batched, 64",
            "single, 64",
        ),
    )

    def open(self, lab: Lab, stack: ExitStack) -> Mapping[str, Side]:
        """Chunks are read once; every measurement learns them anew from fresh weights."""
        core, stream = lab.core(), lab.stream(self.name)

        def sides(length: int) -> tuple[Side, Side]:
            chunks = [_Chunk(core, stream.take(length)) for _ in range(_SESSIONS)]
            return (
                lambda _: _rate(core, [[chunk.write() for chunk in chunks]]),
                lambda _: _rate(core, [[chunk.write()] for chunk in chunks]),
            )

        batched, single = sides(lab.pick(256, 32))
        batched_short, single_short = sides(lab.pick(64, 16))
        return {
            "batched": batched,
            "single": single,
            "batched, 64": batched_short,
            "single, 64": single_short,
        }


def _rate(core: EngineCore, batches: list[list[Write]]) -> Sample:
    begun = time.perf_counter()
    for batch in batches:
        core.writer.step(batch)
    return Sample(_SESSIONS / (time.perf_counter() - begun))


class _Chunk:
    """A text that was read without fast weights, as the engine leaves it to be learned."""

    def __init__(self, core: EngineCore, tokens: Prompt) -> None:
        self._core = core
        self._ids = torch.tensor(tokens)
        self._cache = core.model.new_cache(len(tokens))
        self._boundary, final = _read(core, self._ids, self._cache, 0)
        read = ChunkRead(self._ids, 0, len(tokens), self._boundary, final, self._cache)
        keep = probabilities_fit(core.model, len(tokens))
        scores = score(core.model, read, keep=keep)
        self._top = top_gradient(scores, core.model.head, self._ids[1:])

    def write(self) -> Write:
        """Of UPDATE_1, from fresh weights."""
        return Write(
            tag=StepTag(0, None, 0, "WRITE"),
            action=Action.UPDATE_1,
            cache=self._cache,
            start=0,
            boundary=self._boundary[:-1],
            targets=self._ids[1:],
            staged=self._core.bank.fresh_state(),
            top=self._top,
        )


@torch.no_grad()
def _read(
    core: EngineCore, ids: torch.Tensor, cache: KVCache, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Boundary and final activations of `ids`, the tokens from position `start` on."""
    model, first = core.model, core.bank.layout.first_layer
    batch = model.batch([(cache, start, len(ids))])
    boundary = model.run(model.embed(ids, batch), 0, first, batch)
    final = model.run(boundary, first, model.config.num_layers, batch)
    cache.length = start + len(ids)
    return boundary, model.normed(final)


class Actions:
    """Reading and learning a document of two chunks of 256 by each action."""

    name = "actions"
    unit = "s/chunk"
    comparisons = tuple(
        Comparison(action.name, "SKIP", action.name, "SKIP", Target(limit, goal, "lower"))
        for action, limit, goal in (
            (Action.UPDATE_1, 1.9, 1.5),
            (Action.UPDATE_2, 2.8, 2.0),
            (Action.UPDATE_4, 4.6, 3.0),
        )
    )

    def open(self, lab: Lab, stack: ExitStack) -> Mapping[str, Side]:
        """One side per action, each with texts of its own: none is ever seen twice."""
        core, chunk = lab.core(), lab.pick(256, 32)

        def side(action: Action) -> Side:
            rounds = lab.rounds(f"{self.name}/{action.name}", 1, 2 * chunk)

            def measure(number: int) -> Sample:
                name = f"{action.name}-{number}"
                core.sessions.create(name, TTTParams())
                ttt = TTTParams(session=name, action=action, chunk_size=chunk)
                seconds, _ = timed_run(core, [AdaptRequest((rounds[number][0],), ttt)])
                core.delete_session(name)
                return Sample(seconds / 2)

            return measure

        return {action.name: side(action) for action in Action}


class FeaturesAndGate:
    """The 32 features and a policy network's decision, as a share of the chunk's forward.

    The network is an untrained one of the shipped shape: only its time counts.
    """

    name = "features-and-gate"
    unit = "s/chunk"
    comparisons = (
        Comparison(
            "features + gate", "a chunk's forward", "gate", "forward", Target(0.01, 0.003, "lower")
        ),
    )

    def open(self, lab: Lab, stack: ExitStack) -> Mapping[str, Side]:
        """A text of four chunks: each is read, then judged."""
        core, chunk = lab.core(), lab.pick(256, 32)
        rounds, gate = lab.rounds(self.name, 1, 4 * chunk), _untrained_gate(chunk)
        measured: dict[int, tuple[float, float]] = {}

        def both(number: int) -> tuple[float, float]:
            if number not in measured:
                measured[number] = _judged_read(core, gate, rounds[number][0], chunk)
            return measured[number]

        return {
            "gate": lambda number: Sample(both(number)[1]),
            "forward": lambda number: Sample(both(number)[0]),
        }


@torch.inference_mode()
def _judged_read(
    core: EngineCore, gate: PolicyGate, prompt: Prompt, chunk: int
) -> tuple[float, float]:
    """Median seconds of a chunk's forward (with its losses), and of features and gate."""
    model, ids = core.model, torch.tensor(prompt)
    cache, hidden = model.new_cache(len(ids)), model.config.hidden_size
    boundary, final = torch.empty(len(ids), hidden), torch.empty(len(ids), hidden)
    reads, gates = [], []
    for start in range(0, len(ids), chunk):
        rows = slice(start, start + chunk)
        begun = time.perf_counter()
        boundary[rows], final[rows] = _read(core, ids[rows], cache, start)
        read = ChunkRead(ids, start, start + chunk, boundary, final, cache)
        scores = score(model, read)
        middle = time.perf_counter()
        text = core.tokenizer.decode(ids[rows].tolist())
        first = core.bank.layout.first_layer
        gate.logits(extract(observe(model, first, read, scores, text, chunk, History()))[None])
        reads.append(middle - begun)
        gates.append(time.perf_counter() - middle)
    return statistics.median(reads), statistics.median(gates)


def _untrained_gate(chunk: int) -> PolicyGate:
    width = len(FEATURE_NAMES)
    scales = ((0.0,) * width, (1.0,) * width)
    return PolicyGate(
        PolicyNetwork((64, 64)), PolicyMetadata("timing only", chunk, "nominal", (2.0,), *scales)
    )
