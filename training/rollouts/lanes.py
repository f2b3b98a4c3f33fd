"""Lanes: sessions that read and learn in lock-step, on the engine's own phases.

The trunk never changes, so its activations are computed once per document and kept; from then on
a read replays the adaptive blocks only. What a lane does is what the engine does with an adapt
request of the same documents: a test holds them together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.chunking import chunk_keys
from ponderttt.adaptation.features import extract
from ponderttt.adaptation.loss import token_losses
from ponderttt.adaptation.observation import History
from ponderttt.adaptation.observe import ChunkRead, Scores, observe, score
from ponderttt.adaptation.params import TTTParams
from ponderttt.adaptation.update import TopGradient, Write, probabilities_fit, top_gradient
from ponderttt.engine.core import EngineCore
from ponderttt.errors import InvalidRequestError
from ponderttt.fast_weights.adapter import BatchedAdapter
from ponderttt.fast_weights.bank import AdapterState, StepTag
from ponderttt.models.decoder import Decoder
from ponderttt.models.kv_cache import KVCache
from ponderttt.sessions.session import Session
from training.rollouts.episodes import Episode

# Rows of the trunk run at once.
_TRUNK_ROWS = 512


@dataclass(slots=True)
class Document:
    """A document as far as it is read; what `Reader.read` needs of a sequence."""

    tokens: list[int]
    cache: KVCache
    boundary: Tensor | None
    final: Tensor | None
    replays: bool = True
    computed: int = 0


@dataclass(slots=True)
class Lane:
    """One running episode.

    Args:
        episode: what is read.
        session: owner of the fast weights, pinned into the bank; keeps ledger and averages.
        position: index of the next chunk.
        document: the one being read.
        scores: of the chunk read last.
    """

    episode: Episode
    session: Session
    position: int = 0
    document: Document | None = None
    scores: Scores | None = None
    top: TopGradient | None = None
    read_version: int = 0

    @property
    def done(self) -> bool:
        """Every chunk has been read."""
        return self.position >= len(self.episode.chunks)

    @property
    def ahead(self) -> int:
        """Chunks that follow the one read last."""
        return len(self.episode.chunks) - self.position

    @property
    def near(self) -> int:
        """Those of them that belong to the same document."""
        chunks, document = self.episode.chunks, self.span[0]
        return sum(index == document for index, _, _ in chunks[self.position :])

    @property
    def span(self) -> tuple[int, int, int]:
        """(document, start, end) of the chunk read last."""
        return self.episode.chunks[self.position - 1]

    @property
    def tokens(self) -> int:
        """Of the chunk read last."""
        _, start, end = self.span
        return end - start


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a write did.

    Args:
        action: as asked.
        losses: the chunk's loss before each step and after the last, nats per token.
        failure: why it was rolled back, or None.
        states: weights and optimiser state after each step, where they were asked for.
    """

    action: Action
    losses: tuple[float, ...]
    failure: str | None
    states: tuple[AdapterState, ...] = ()


@dataclass(slots=True)
class TrunkCache:
    """Boundary activations of documents, least recently used first out.

    Args:
        limit: bytes kept at most.
    """

    limit: int = 4 << 30
    kept: OrderedDict[tuple[int, ...], Tensor] = field(default_factory=OrderedDict)
    size: int = 0

    def get(self, core: EngineCore, tokens: tuple[int, ...]) -> Tensor:
        """[T, hidden] of a document."""
        if tokens in self.kept:
            self.kept.move_to_end(tokens)
            return self.kept[tokens]
        boundary = run_trunk(core.model, core.bank.layout.first_layer, tokens)
        self.kept[tokens] = boundary
        self.size += boundary.nbytes
        while self.size > self.limit and len(self.kept) > 1:
            self.size -= self.kept.popitem(last=False)[1].nbytes
        return boundary


def run_trunk(model: Decoder, last: int, tokens: Seq[int]) -> Tensor:
    """Hidden states [T, hidden] that enter block `last`, for a whole document."""
    # Not an inference tensor: a write takes gradients through what is made of it.
    boundary = torch.empty(
        (len(tokens), model.config.hidden_size), device=model.device, dtype=model.dtype
    )
    cache = model.new_cache(len(tokens))
    with torch.inference_mode():
        for start in range(0, len(tokens), _TRUNK_ROWS):
            ids = torch.tensor(tokens[start : start + _TRUNK_ROWS], device=model.device)
            batch = model.batch([(cache, start, len(ids))])
            rows = model.run(model.embed(ids, batch), 0, last, batch)
            boundary[start : start + len(ids)].copy_(rows)
            cache.length = start + len(ids)
    return boundary


class Lanes:
    """Runs many episodes at once, one session each.

    Args:
        core: gives model, bank, phases and costs; its bank needs a slot for every lane.
        trunks: of other lanes on the same model whose fast weights begin at the same block.
    """

    def __init__(self, core: EngineCore, trunks: TrunkCache | None = None) -> None:
        self.core = core
        self._trunks = TrunkCache() if trunks is None else trunks
        self._opened = 0

    def open(self, episode: Episode) -> Lane:
        """Begin an episode with fresh weights.

        Raises:
            InvalidRequestError: a document is longer than what the engine reads at once.
            RuntimeError: no slot of the bank is free.
        """
        longest = max(map(len, episode.documents), default=0)
        if longest > self.core.max_model_len:
            raise InvalidRequestError(
                "document_tokens",
                f"a document of {episode.name} has {longest} tokens; "
                f"the model reads {self.core.max_model_len} at once",
            )
        self._opened += 1
        sessions = self.core.sessions
        session = sessions.create(f"lane-{self._opened}", TTTParams())
        if not sessions.acquire(session):
            sessions.delete(session.owner)
            raise RuntimeError(f"all {self.core.bank.capacity} slots of the bank are in use")
        return Lane(episode, session)

    def close(self, lane: Lane) -> None:
        """Forget the lane's session."""
        self.core.sessions.release(lane.session)
        self.core.sessions.delete(lane.session.owner)

    def read(self, lanes: Seq[Lane]) -> None:
        """Each lane reads its next chunk with its weights of now; `scores` tells the losses."""
        for lane in lanes:
            self._turn_page(lane)
        pieces = []
        for lane in lanes:
            _, start, end = lane.episode.chunks[lane.position]
            pieces.append((_document(lane), end - start))
            lane.position += 1
        bank = self.core.bank
        tags = [bank.tag(lane.session.slot, lane.session.owner) for lane in lanes]
        self.core.reader.read(pieces, tags)
        for lane in lanes:
            self.score(lane)

    def score(self, lane: Lane) -> None:
        """Losses of the chunk read last, with the weights of now."""
        model, bank = self.core.model, self.core.bank
        with torch.inference_mode():
            keep = probabilities_fit(model, lane.tokens) and self.learns(lane)
            lane.scores = score(model, self._chunk(lane), keep=keep)
        lane.top, lane.read_version = None, bank.version(lane.session.slot)

    def features(self, lane: Lane, history: History) -> Tensor:
        """[32], of the chunk read last."""
        document, scores = _document(lane), lane.scores
        if scores is None:
            raise RuntimeError("a lane has features once it has read a chunk")
        _, start, end = lane.span
        text = self.core.tokenizer.decode(document.tokens[start:end])
        first, size = self.core.bank.layout.first_layer, lane.episode.chunk_size
        with torch.inference_mode():
            read = self._chunk(lane)
            return extract(observe(self.core.model, first, read, scores, text, size, history))

    def learns(self, lane: Lane) -> bool:
        """Whether the chunk read last is long enough to be learned, and has not been yet."""
        short = lane.tokens < self._least(lane.episode)
        return not short and not lane.session.has_learned(self._keys(lane)[-1])

    def learnable(self, episode: Episode) -> bool:
        """Whether any chunk of the episode is long enough to be learned."""
        return any(end - start >= self._least(episode) for _, start, end in episode.chunks)

    def _least(self, episode: Episode) -> int:
        return min(self.core.writer.rule.min_tokens, episode.chunk_size)

    def _keys(self, lane: Lane) -> list[str]:
        index, start, end = lane.span
        ids = lane.episode.documents[index][start:end]
        return chunk_keys(ids, lane.episode.chunk_size, self.core.writer.rule.min_tokens)

    def _remember(self, lane: Lane) -> None:
        *parts, whole = self._keys(lane)
        for part in parts:
            lane.session.remember(part)
        lane.session.remember(whole, lane.tokens)

    def write(
        self, lanes: Seq[Lane], actions: Seq[Action], *, keep_states: bool = False
    ) -> list[Outcome]:
        """Gradient steps on the chunks read last, in the batches of `Writer.step`.

        They are committed, where they don't fail, unless the states are kept.

        Args:
            lanes: whose chunks; all of them learn (no SKIP).
            actions: one per lane.
            keep_states: keep the states in between, too.
        """
        writes = [self._begin(lane, action) for lane, action in zip(lanes, actions, strict=True)]
        states: list[list[AdapterState]] = [[] for _ in writes]
        while running := [write for write in writes if not write.finished]:
            self.core.writer.step(running)
            for write, kept in zip(writes, states, strict=True):
                if keep_states and write in running:
                    kept.append(write.staged)
        for lane, write in zip(lanes, writes, strict=True):
            if write.failure is None and not keep_states:
                lane.session.version = self.core.bank.commit(write.tag, write.staged)
                self._remember(lane)
            elif write.failure is not None:
                lane.session.rollbacks += 1
        return [
            Outcome(write.action, tuple(write.losses), write.failure, tuple(kept))
            for write, kept in zip(writes, states, strict=True)
        ]

    def commit(self, lane: Lane, state: AdapterState) -> None:
        """Make a state that `write` kept the session's own: the chunk read last is learned."""
        self.adopt(lane, state)
        self._remember(lane)

    def adopt(self, lane: Lane, state: AdapterState) -> None:
        """Make a state the session's own, wherever it comes from."""
        bank, session = self.core.bank, lane.session
        tag = StepTag(session.slot, session.owner, bank.version(session.slot), "WRITE")
        session.version = bank.commit(tag, state)

    def record(self, lane: Lane, action: Action, *, budgeted: bool = True) -> None:
        """Enter the chunk read last into the session's ledger and averages."""
        scores = lane.scores
        loss = scores.loss if scores is not None and scores.losses.numel() else None
        lane.session.ledger.charge(action, self.core.costs, 0.0, budgeted=budgeted)
        lane.session.record(loss, self.core.costs["nominal"][action])
        # The chunk is done with, and its probabilities are large.
        lane.scores, lane.top = scores and replace(scores, probabilities=()), None

    def peek(self, requests: Seq[tuple[Lane, int, Tensor]], tokens: int) -> list[float]:
        """Losses of chunks still to be read, had the lanes these weights; changes nothing.

        Args:
            requests: lane, index of a chunk (the next one, or one that begins a document), and
                weights [P].
            tokens: rows looked at from the chunk's start at most.
        Returns:
            Sum of the losses in nats over the chunk's tokens from the second on (the first is
            predicted by what was read before), per request.
        """
        model, layout = self.core.model, self.core.bank.layout
        segments, rows, targets = [], [], []
        for lane, index, _ in requests:
            document, start, end = lane.episode.chunks[index]
            ids = lane.episode.documents[document]
            count = min(end - start - 1, tokens)
            boundary = self._trunks.get(self.core, ids)
            segments.append((self._past(lane, document, start), start, count))
            rows.append(boundary[start : start + count])
            targets.append(torch.tensor(ids[start + 1 : start + 1 + count], device=model.device))
        weights = torch.stack([flat for _, _, flat in requests])
        lengths = [count for _, _, count in segments]
        with torch.inference_mode():
            batch = model.batch(segments, replay=True)
            adapter = BatchedAdapter(
                layout.views(weights), range(len(segments)), lengths, layout.config.scale
            )
            x = model.run(torch.cat(rows), layout.first_layer, layout.last_layer, batch, adapter)
            losses = token_losses(model.normed(x), model.head, torch.cat(targets))
        return [float(piece.sum()) for piece in losses.split(lengths)]

    def _past(self, lane: Lane, document: int, start: int) -> KVCache:
        """Keys and values before `start` of a document."""
        if start == 0:
            return self.core.model.new_cache(1)
        current = _document(lane)
        if lane.span[0] != document or current.computed != start:
            raise RuntimeError("only the next chunk, or the first of a document, can be peeked at")
        return current.cache

    def _turn_page(self, lane: Lane) -> None:
        """Open the next document where the next chunk begins one."""
        index, start, _ = lane.episode.chunks[lane.position]
        if start:
            return
        lane.document = self.document(lane.episode, index)

    def document(self, episode: Episode, index: int) -> Document:
        """A document of the episode of which nothing is read yet."""
        tokens = episode.documents[index]
        boundary = self._trunks.get(self.core, tokens)
        _, final = self.core.reader.new_buffers(len(tokens))
        return Document(list(tokens), self.core.model.new_cache(len(tokens)), boundary, final)

    def _chunk(self, lane: Lane) -> ChunkRead:
        document, (_, start, end) = _document(lane), lane.span
        if document.boundary is None or document.final is None:
            raise RuntimeError("a lane's document keeps its activations")
        ids = torch.tensor(document.tokens[:end], device=self.core.model.device)
        return ChunkRead(ids, start, end, document.boundary, document.final, document.cache)

    def _begin(self, lane: Lane, action: Action) -> Write:
        document, (_, first, end) = _document(lane), lane.span
        bank, session = self.core.bank, lane.session
        if document.boundary is None:
            raise RuntimeError("a lane's document keeps its activations")
        start = max(first - 1, 0)
        version = bank.version(session.slot)
        return Write(
            tag=StepTag(session.slot, session.owner, version, "WRITE"),
            action=action,
            cache=document.cache,
            start=start,
            boundary=document.boundary[start : end - 1],
            targets=torch.tensor(document.tokens[start + 1 : end], device=self.core.model.device),
            staged=bank.state(session.slot, session.owner),
            # As the engine does it.
            top=self._top(lane) if version == lane.read_version else None,
        )

    def _top(self, lane: Lane) -> TopGradient | None:
        """Of the chunk read last; made once, since that uses the probabilities up."""
        scores, (_, start, end) = lane.scores, lane.span
        if scores is not None and scores.probabilities:
            model = self.core.model
            targets = _document(lane).tokens[max(start, 1) : end]
            with torch.inference_mode():
                lane.top = top_gradient(
                    scores, model.head, torch.tensor(targets, device=model.device)
                )
            lane.scores = replace(scores, probabilities=())
        return lane.top


def _document(lane: Lane) -> Document:
    if lane.document is None:
        raise RuntimeError("a lane has a document once it has read a chunk")
    return lane.document
