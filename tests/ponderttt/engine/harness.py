"""Small engines for tests, texts to teach them, and a driver that notices when one is stuck."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ponderttt.adaptation.params import TTTParams
from ponderttt.adaptation.policy import PolicyGate
from ponderttt.adaptation.rules import UpdateRule
from ponderttt.engine.config import EngineConfig
from ponderttt.engine.core import EngineCore
from ponderttt.engine.generator import Generator
from ponderttt.engine.observer import NullObserver, StepRecord
from ponderttt.engine.outputs import (
    ChunkEvent,
    ChunkReport,
    DoneEvent,
    ErrorEvent,
    Event,
    FinishEvent,
    PromptEvent,
    TokenEvent,
    TTTReport,
)
from ponderttt.engine.request import AdaptRequest, GenerateRequest, Request
from ponderttt.engine.sampler import SampledToken
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.fast_weights.layout import LoRAConfig
from ponderttt.models.checkpoint import load_decoder, torch_device, torch_dtype
from ponderttt.models.decoder import Decoder
from ponderttt.models.tokenizer import Tokenizer
from tests import helpers

#: Teaches a tiny random model something with every step, and seldom does harm.
RULE = UpdateRule(learning_rate=3e-3, min_tokens=8)

#: Learns each of these chunks once, whatever the budget.
FIXED = TTTParams(gate="fixed", chunk_size=32)

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@cache
def load(directory: Path) -> tuple[Decoder, Tokenizer]:
    """A checkpoint in float32; read once in a test run."""
    decoder = load_decoder(directory, torch_device("cpu"), torch_dtype("float32"))
    return decoder, Tokenizer.from_dir(directory)


def make_core(
    directory: Path,
    *,
    rule: UpdateRule = RULE,
    policy: PolicyGate | None = None,
    generator: Generator | None = None,
    **settings: Any,
) -> EngineCore:
    """An engine whose upper two of four blocks adapt."""
    decoder, tokenizer = load(directory)
    settings.setdefault("lora", LoRAConfig(layers=2))
    config = EngineConfig(measure_costs=False, **settings)
    return EngineCore(decoder, tokenizer, "tiny", config, rule, policy, generator)


@cache
def corpus(directory: Path) -> tuple[int, ...]:
    """Tokens of real code."""
    _, tokenizer = load(directory)
    return tuple(tokenizer.encode(helpers.source_text()))


def text(directory: Path, number: int, length: int) -> tuple[int, ...]:
    """The `number`-th text: `length` tokens of code that no other text contains."""
    start = number * 512
    return corpus(directory)[start : start + length]


@dataclass
class Outcome:
    """What came of one request, put together from its events."""

    events: list[Event] = field(default_factory=list)

    @property
    def tokens(self) -> list[list[int]]:
        """Token ids of each sequence."""
        return [[t for e in self._tokens(i) for t in e.token_ids] for i in self._indices()]

    @property
    def texts(self) -> list[str]:
        """Text of each sequence."""
        return ["".join(e.text for e in self._tokens(i)) for i in self._indices()]

    @property
    def logprobs(self) -> list[list[SampledToken]]:
        """Log-probabilities of each sequence."""
        return [[t for e in self._tokens(i) for t in e.logprobs] for i in self._indices()]

    @property
    def reasons(self) -> dict[int, str]:
        """Why each sequence ended."""
        return {e.index: e.reason for e in self.events if isinstance(e, FinishEvent)}

    @property
    def prompt(self) -> PromptEvent:
        """The scored prompt."""
        (event,) = [e for e in self.events if isinstance(e, PromptEvent)]
        return event

    @property
    def chunks(self) -> list[ChunkReport]:
        """Reports as they came."""
        return [e.report for e in self.events if isinstance(e, ChunkEvent)]

    @property
    def ended(self) -> bool:
        """Whether the last event has come."""
        return bool(self.events) and isinstance(self.events[-1], DoneEvent | ErrorEvent)

    @property
    def done(self) -> DoneEvent:
        """The last event of a request that went well."""
        last = self.events[-1]
        if isinstance(last, ErrorEvent):
            raise last.error
        assert isinstance(last, DoneEvent)
        return last

    @property
    def report(self) -> TTTReport:
        """The account of what was learned."""
        assert self.done.ttt is not None
        return self.done.ttt

    @property
    def error(self) -> Exception:
        """What a failed request ended with."""
        last = self.events[-1]
        assert isinstance(last, ErrorEvent)
        return last.error

    def _indices(self) -> list[int]:
        return sorted({e.index for e in self.events if isinstance(e, TokenEvent | FinishEvent)})

    def _tokens(self, index: int) -> list[TokenEvent]:
        return [e for e in self.events if isinstance(e, TokenEvent) and e.index == index]


def submit(core: EngineCore, request: Request) -> Outcome:
    """Queue a request; its events arrive in the outcome as the engine steps."""
    outcome = Outcome()
    core.enqueue(core.prepare(request, outcome.events.append))
    return outcome


def _step(core: EngineCore) -> bool:
    """A step; False where nothing will come of another one."""
    worked = core.step()
    if not worked and core._admission.awaits_sessions:
        time.sleep(0.001)
        return True
    return worked


def drain(core: EngineCore, limit: int = 20_000) -> None:
    """Step until nothing is left to do; fails where work is left that never gets done."""
    for _ in range(limit):
        if not core.has_work:
            return
        assert _step(core), "work is left, but no phase can run"
    raise AssertionError(f"not finished after {limit} phases")


def step_until(core: EngineCore, condition: Any, limit: int = 2000) -> None:
    """Step until `condition()` holds."""
    for _ in range(limit):
        if condition():
            return
        assert _step(core), "nothing left to do, and the condition does not hold"
    raise AssertionError(f"the condition does not hold after {limit} phases")


def run(core: EngineCore, *requests: Request) -> list[Outcome]:
    """Run requests side by side to their ends."""
    outcomes = [submit(core, request) for request in requests]
    drain(core)
    return outcomes


def generate(
    core: EngineCore,
    prompt: tuple[int, ...],
    sampling: SamplingParams = GREEDY,
    ttt: TTTParams | None = None,
) -> Outcome:
    """Run one prompt by itself."""
    (outcome,) = run(core, GenerateRequest(prompt, sampling, ttt))
    return outcome


def adapt(core: EngineCore, *documents: tuple[int, ...], ttt: TTTParams) -> Outcome:
    """Teach documents by themselves."""
    (outcome,) = run(core, AdaptRequest(documents, ttt))
    return outcome


def weights(core: EngineCore, name: str) -> torch.Tensor:
    """A session's fast weights."""
    return core.sessions.state(core.sessions.get(name)).weights


def holdings(core: EngineCore) -> tuple[int, int, dict[str, int]]:
    """What requests hold and must give back: bank slots, KV positions, pins by session."""
    stats = core.stats()
    pins = {name: core.sessions.get(name).pins for name in core.sessions.names()}
    return stats.bank_occupied, stats.kv_tokens, pins


class Recorder(NullObserver):
    """Keeps what the engine tells its observer."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.chunks: list[ChunkReport] = []
        self.outcomes: list[tuple[str, int, int]] = []
        self.first_tokens: list[float] = []
        self.next_tokens: list[float] = []

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def chunk(self, report: ChunkReport) -> None:
        self.chunks.append(report)

    def first_token(self, seconds: float) -> None:
        self.first_tokens.append(seconds)

    def next_token(self, seconds: float) -> None:
        self.next_tokens.append(seconds)

    def finished(
        self, outcome: str, prompt_tokens: int, generated_tokens: int, seconds: float
    ) -> None:
        self.outcomes.append((outcome, prompt_tokens, generated_tokens))
