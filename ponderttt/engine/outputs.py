"""What the engine tells its callers: events while a request runs, and its final account."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ponderttt.adaptation.actions import Action, CostModelName
from ponderttt.adaptation.params import GateName, When
from ponderttt.engine.sampler import SampledToken

FinishReason = Literal["stop", "length", "abort"]
ReadWeights = Literal["session", "base"]
Phase = Literal["prompt", "generated"]
#: A gate's name, or why the gate's wish was not followed.
Reason = Literal[
    "policy", "threshold", "random", "fixed", "off", "seen", "short", "budget", "rolled_back"
]


@dataclass(frozen=True, slots=True)
class ChunkReport:
    """What was decided about one chunk, and what came of it.

    Args:
        index: of the chunk in its request, from 0.
        phase: whether the chunk belongs to the prompt (or document) or was generated.
        start, end: its tokens, half open, in the sequence (or document window).
        action: what was done (or tried, where it was rolled back).
        reason: why: the gate, or what overrode it. `seen`: learned before; `short`: too few
            tokens; `budget`: the ledger allowed less; `rolled_back`: the update did harm.
        loss_before: nats per token as the chunk was read; None where nothing predicts it.
        loss_after: after the update, on the same tokens; None where nothing was learned.
        cost: × forward, in the request's cost model.
        nominal, measured: × forward in each cost model.
        seconds: wall time of this machine, read and write (its share of batched phases).
        document: index of the document in an adapt request.
        rollback: why an update was rolled back: `not_finite`, `norm` (too far from fresh weights),
            `loss` (its own chunk got worse) or `error` (the write raised, out of memory say).
    """

    index: int
    phase: Phase
    start: int
    end: int
    action: Action
    reason: Reason
    loss_before: float | None
    loss_after: float | None
    cost: float
    nominal: float
    measured: float
    seconds: float
    document: int = 0
    rollback: str | None = None


@dataclass(frozen=True, slots=True)
class CostSummary:
    """Cost of a request's chunks: means per chunk in both models (× forward), seconds in all."""

    nominal: float
    measured: float
    seconds: float
    chunks: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Whose weights answered, where that was left to the prompt.

    Args:
        read: the session's, or the base model's.
        session, base: loss of the prompt with either, nats per token.
        error: standard error of their difference.
        tokens: that were compared.
    """

    read: ReadWeights
    session: float
    base: float
    error: float
    tokens: int


@dataclass(frozen=True, slots=True)
class TTTReport:
    """What test-time training did for one request.

    Args:
        session: its id; None: the weights lived for this request only.
        version_before, version_after: of the fast weights.
        digest: SHA-256 of the fast weights the request began to read with.
        gate, budget, cost_model, chunk_size, when: in force for this request.
        cost: mean and total.
        chunks: reports in order; for `background`, those known when the answer was complete.
        pending: chunks left to learn in the background.
        choice: whose weights answered; None: nothing was compared, so the session's did.
    """

    session: str | None
    version_before: int
    version_after: int
    digest: str
    gate: GateName
    budget: float | None
    cost_model: CostModelName
    chunk_size: int
    when: When
    cost: CostSummary
    chunks: tuple[ChunkReport, ...]
    pending: int = 0
    choice: Choice | None = None


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """Log-probabilities of the prompt's tokens (the first has none); comes before any token."""

    token_ids: tuple[int, ...]
    logprobs: tuple[SampledToken | None, ...]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Tokens and text of sequence `index` (0 … n-1) since the last event.

    Text is held back while it may be part of a stop string or of a character; `token_ids`,
    `logprobs` (empty unless asked for) and `offsets` (characters from the start of the generated
    text at which each token begins) come with the text that is emitted.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[SampledToken, ...]
    offsets: tuple[int, ...]

    def joined(self, later: TokenEvent) -> TokenEvent:
        """This event and a later one of the same sequence as one."""
        return TokenEvent(
            self.index,
            self.text + later.text,
            self.token_ids + later.token_ids,
            self.logprobs + later.logprobs,
            self.offsets + later.offsets,
        )


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """Sequence `index` has ended."""

    index: int
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class ChunkEvent:
    """One chunk has been dealt with."""

    report: ChunkReport


@dataclass(frozen=True, slots=True)
class DoneEvent:
    """The request is complete; the last event.

    Args:
        prompt_tokens: of the prompt, or of all documents.
        generated_tokens: over all sequences.
        ttt: None for a request without chunks (gate `off` outside adapt, no session).
        cached_tokens: of `prompt_tokens`, those whose trunk was found in the prefix cache, whether
            or not the adaptive blocks had to be run over them.
    """

    prompt_tokens: int
    generated_tokens: int
    ttt: TTTReport | None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """The request failed; the last event. The engine and other requests go on."""

    error: Exception


Event = PromptEvent | TokenEvent | FinishEvent | ChunkEvent | DoneEvent | ErrorEvent
