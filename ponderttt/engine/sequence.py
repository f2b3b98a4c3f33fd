"""One request and its sequences: tokens, progress, buffers. Print one and see where it stands."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.update import TopGradient, Write
from ponderttt.engine.detokenizer import IncrementalDetokenizer
from ponderttt.engine.outputs import Choice, ChunkReport, Event, FinishReason, Phase, Reason
from ponderttt.engine.request import AdaptRequest, Request
from ponderttt.engine.resolve import ResolvedTTT
from ponderttt.engine.sampler import SampledToken
from ponderttt.engine.sampler_state import SamplerState
from ponderttt.models.kv_cache import KVCache
from ponderttt.sessions.session import Session


class Status(Enum):
    """Where a sequence stands."""

    PREFILL = "prefill"
    JUDGED = "judged"  # waits for its rival to read the prompt as well
    DECODE = "decode"
    REMOTE = "remote"  # a `Generator` draws its tokens
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Span:
    """A chunk to come: its tokens start … end-1 and where they are from."""

    start: int
    end: int
    phase: Phase


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens of one request (or document window) and how far they are computed.

    Args:
        group: the request it belongs to.
        index: among the request's n sequences.
        tokens: prompt, then generated.
        prompt_len: tokens of the prompt.
        cache: keys and values of the first `computed` tokens.
        spans: chunks that the gate will be asked about, in order.
        boundary: [capacity, hidden], hidden states at the trunk's top, kept for chunks and for the
            prefix cache; siblings have none.
        final: [capacity, hidden], hidden states after the final norm, kept for chunks and scores.
        known: positions whose trunk need not be run: `cache` and `boundary` hold it.
        chain: keys of the prompt's blocks in the prefix cache; None: not looked up yet.
        pure_version, pure_end: positions before `pure_end` were read at this version throughout.
        chunk_version: at which the chunk to come was read so far; None: at more than one.
        base: reads the base model's weights, whatever the session's are.
        document: index of the document in an adapt request.
        continuation: name of the part that a `Generator` is drawing now.
        held: tokens not yet sent, because their text may be part of a stop string.
    """

    group: Group
    index: int
    tokens: list[int]
    prompt_len: int
    cache: KVCache
    spans: deque[Span] = field(default_factory=deque)
    boundary: Tensor | None = None
    final: Tensor | None = None
    known: int = 0
    chain: tuple[bytes, ...] | None = None
    pure_version: int = 0
    pure_end: int = 0
    chunk_version: int | None = None
    base: bool = False
    document: int = 0
    sampler: SamplerState | None = None
    detokenizer: IncrementalDetokenizer | None = None
    status: Status = Status.PREFILL
    computed: int = 0
    read_seconds: float = 0.0
    held: list[tuple[int, SampledToken]] = field(default_factory=list)
    continuation: str | None = None
    last_token_at: float | None = None
    finish_reason: FinishReason | None = None

    @property
    def generated(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def replays(self) -> bool:
        """Whether the next position is known up to the trunk's top: read the blocks above only."""
        return self.computed < self.known

    @property
    def chunk_end(self) -> int:
        """Where something must happen next: the gate is asked, or the next token drawn."""
        # Beyond the prompt there is something to prefill only where somebody else generates.
        end = len(self.tokens)
        return min(self.spans[0].end, end) if self.spans else end

    @property
    def read_end(self) -> int:
        """Positions that reading the text to its end would fill: the last token drawn is not read.

        The same whoever generates, so that chunks come out the same."""
        return max(self.prompt_len, len(self.tokens) - 1)

    @property
    def prefill_end(self) -> int:
        """How far the next read may go without passing a chunk's end, or that of the known part."""
        return min(self.chunk_end, self.known) if self.replays else self.chunk_end

    def is_pure(self, version: int) -> bool:
        """Whether all that is computed was read at this version."""
        unread = not self.computed
        return unread or (self.computed == self.pure_end and version == self.pure_version)

    def note_read(self, version: int, count: int) -> None:
        """Positions up to `computed`, the last `count` of them new, have been read at `version`."""
        if self.spans:
            if self.computed - count <= self.spans[0].start:
                self.chunk_version = version
            elif version != self.chunk_version:
                self.chunk_version = None
        if self.computed - count != self.pure_end:
            return
        if not self.pure_end:
            self.pure_version = version
        if version == self.pure_version:
            self.pure_end = self.computed


@dataclass(slots=True, eq=False)
class PendingWrite:
    """A chunk whose update has been decided; `write` is made when its turn comes.

    Args:
        decided: seconds of the monotonic clock; of a session's writes the oldest goes first.
        top: what the read knows of the first step, which holds while the version is `read_version`.
    """

    sequence: Sequence
    span: Span
    chunk: str
    action: Action
    reason: Reason
    loss_before: float | None
    seconds: float
    write: Write | None = None
    top: TopGradient | None = None
    read_version: int | None = None
    decided: float = field(default_factory=time.monotonic)

    @property
    def rows(self) -> int:
        """Rows of the replay."""
        return self.span.end - max(self.span.start, 1)


@dataclass(slots=True, eq=False)
class Group:
    """One request while the engine works on it.

    Args:
        request: as it came.
        session: whose fast weights it reads; None reads the base model.
        named: the request names a session or asks for `ttt`, so the answer reports it.
        ttt: settings in force.
        sink: takes the events.
        sequences: running or finished.
        judges: the prompt is to tell whose weights answer it.
        rival: reads the prompt with the base model's weights, to be compared.
        choice: what came of it.
        windows: of an adapt request: (document, token ids) still to be read.
        write: the update that the request waits for.
        reserved: positions of KV cache set aside.
        cached_tokens: of the prompt or the documents, found in the prefix cache (the trunk's part).
        background: learns in idle time; its answer has been given.
    """

    request: Request
    session: Session | None
    named: bool
    ttt: ResolvedTTT
    sink: Callable[[Event], None]
    sequences: list[Sequence] = field(default_factory=list)
    judges: bool = False
    rival: Sequence | None = None
    choice: Choice | None = None
    windows: deque[tuple[int, tuple[int, ...]]] = field(default_factory=deque)
    reports: list[ChunkReport] = field(default_factory=list)
    write: PendingWrite | None = None
    reserved: int = 0
    cached_tokens: int = 0
    background: bool = False
    version_before: int = 0
    digest: str = ""
    first_token_at: float | None = None

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def has_begun(self) -> bool:
        """Whether anything was read for it; documents may wait between two of their windows."""
        return bool(self.digest)

    @property
    def readers(self) -> list[Sequence]:
        """All that read for it: its sequences and, while it is there, the rival."""
        return self.sequences if self.rival is None else [*self.sequences, self.rival]

    @property
    def is_unread(self) -> bool:
        """Whether it is a prompt of which nothing has been read yet."""
        waits = all(
            s.status is Status.PREFILL and not s.computed and not s.generated
            for s in self.sequences
        )
        return waits and not self.is_adapt

    @property
    def is_adapt(self) -> bool:
        """Whether it teaches documents rather than continuing a prompt."""
        return isinstance(self.request, AdaptRequest)

    @property
    def prompt_tokens(self) -> int:
        """Tokens given by the caller."""
        if isinstance(self.request, AdaptRequest):
            return sum(len(document) for document in self.request.documents)
        return len(self.request.prompt_ids)

    @property
    def generated_tokens(self) -> int:
        """Tokens drawn, over all sequences."""
        return sum(sequence.generated for sequence in self.sequences)

    def chunks_ahead(self, sequence: Sequence) -> int:
        """Chunks of this request that are certain to follow the one just taken off `spans`."""
        size = self.ttt.chunk_size
        certain = sum(span.phase == "prompt" or self.background for span in sequence.spans)
        return certain + sum(-(-len(tokens) // size) for _, tokens in self.windows)
