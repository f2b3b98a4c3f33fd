"""Learning: asks the gate about each chunk, runs the writes, keeps ledger and reports."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from ponderttt.adaptation.actions import Action, CostModel
from ponderttt.adaptation.chunking import chunk_keys
from ponderttt.adaptation.features import extract
from ponderttt.adaptation.gates import (
    Decision,
    FixedGate,
    Gate,
    OffGate,
    RandomGate,
    ThresholdGate,
    within_budget,
)
from ponderttt.adaptation.observe import ChunkRead, Scores, observe, score
from ponderttt.adaptation.policy import PolicyGate
from ponderttt.adaptation.update import Write, Writer, probabilities_fit, top_gradient
from ponderttt.engine.observer import EngineObserver
from ponderttt.engine.outputs import ChunkEvent, ChunkReport, Reason
from ponderttt.engine.resolve import ResolvedTTT
from ponderttt.engine.sequence import Group, PendingWrite, Sequence, Span
from ponderttt.errors import ModelError
from ponderttt.fast_weights.bank import AdapterBank, StepTag
from ponderttt.models.decoder import Decoder
from ponderttt.models.tokenizer import Tokenizer
from ponderttt.models.transfer import tensor_on
from ponderttt.sessions.session import Session

_LOG = logging.getLogger(__name__)


class Learner:
    """What happens between the read of a chunk and the next one.

    Args:
        model: frozen.
        bank: the fast weights.
        writer: takes the gradient steps.
        tokenizer: gives the chunk's text to the features.
        costs: cost models by name.
        policy: the trained gate, where there is one.
        observer: hears of every chunk.
    """

    def __init__(
        self,
        model: Decoder,
        bank: AdapterBank,
        writer: Writer,
        tokenizer: Tokenizer,
        costs: Mapping[str, CostModel],
        policy: PolicyGate | None,
        observer: EngineObserver,
    ) -> None:
        self._model = model
        self._bank = bank
        self._writer = writer
        self._tokenizer = tokenizer
        self._policy = policy
        self.costs = costs
        self.observer = observer

    def is_short(self, tokens: int, ttt: ResolvedTTT) -> bool:
        """Whether a chunk has too few tokens to be learned; a full chunk never has."""
        return tokens < min(self._writer.rule.min_tokens, ttt.chunk_size)

    def consider(self, sequence: Sequence) -> None:
        """Decide about the chunk that the sequence has just read to its end.

        Leaves a `PendingWrite` on the group, or reports the chunk as skipped.

        Raises:
            ModelError: the chunk's loss or features are not finite.
        """
        begun = time.perf_counter()
        span = sequence.spans.popleft()
        group = sequence.group
        session = _session(group)
        with torch.inference_mode():
            read = self._chunk_read(sequence, span)
            scores = score(self._model, read, keep=self._may_learn(sequence, span))
            if not math.isfinite(scores.loss):
                # Entered into the session's averages it would never leave them.
                raise ModelError(
                    f"the loss of tokens {span.start} to {span.end} is not finite: check the "
                    "checkpoint and the session's fast weights"
                )
            action, reason = self._decide(sequence, span, read, scores)
            top = None
            if action is not Action.SKIP:
                targets = read.token_ids[max(span.start, 1) : span.end]
                top = top_gradient(scores, self._model.head, targets)
        loss = scores.loss if scores.losses.numel() else None
        seconds = sequence.read_seconds + time.perf_counter() - begun
        sequence.read_seconds = 0.0
        pending = PendingWrite(
            sequence, span, self._keys(sequence, span)[-1], action, reason, loss, seconds,
            top=top, read_version=sequence.chunk_version,
        )  # fmt: skip
        if action is Action.SKIP:
            self._report(group, session, pending)
        else:
            group.write = pending

    def _chunk_read(self, sequence: Sequence, span: Span) -> ChunkRead:
        if sequence.boundary is None or sequence.final is None:
            raise RuntimeError("a sequence with chunks keeps boundary and final activations")
        ids = tensor_on(self._model.device, sequence.tokens[: span.end])
        return ChunkRead(
            ids, span.start, span.end, sequence.boundary, sequence.final, sequence.cache
        )

    def _may_learn(self, sequence: Sequence, span: Span) -> bool:
        """Whether the gradient at the top may be wanted soon, and [rows, V] can be kept."""
        ttt, size = sequence.group.ttt, span.end - span.start
        learns = ttt.gate != "off" and not self.is_short(size, ttt)
        return learns and probabilities_fit(self._model, size)

    def _decide(
        self, sequence: Sequence, span: Span, read: ChunkRead, scores: Scores
    ) -> tuple[Action, Reason]:
        group, ttt = sequence.group, sequence.group.ttt
        session = _session(group)
        if ttt.gate == "off":
            return Action.SKIP, "off"
        if self.is_short(span.end - span.start, ttt):
            return Action.SKIP, "short"
        if session.has_learned(self._keys(sequence, span)[-1]):
            return Action.SKIP, "seen"
        costs = self.costs[ttt.cost_model]
        allowed = self._allowed(sequence)
        ahead = group.chunks_ahead(sequence)
        credit = session.ledger.credit(costs, ttt.budget)

        def features() -> Tensor:
            text = self._tokenizer.decode(sequence.tokens[span.start : span.end])
            history = session.history(ttt.budget, credit, ahead)
            first = self._bank.layout.first_layer
            return extract(observe(self._model, first, read, scores, text, ttt.chunk_size, history))

        decision = Decision(
            loss=scores.loss,
            features=features,
            allowed=allowed,
            budget=ttt.budget,
            costs=costs,
            threshold=session.threshold,
            draw_key=f"{ttt.seed}/{session.chunks}",
        )
        wanted = self._gate(ttt).choose(decision)
        action = within_budget(wanted, allowed)
        return action, ttt.gate if action is wanted else "budget"

    def _keys(self, sequence: Sequence, span: Span) -> list[str]:
        ids = sequence.tokens[span.start : span.end]
        return chunk_keys(ids, sequence.group.ttt.chunk_size, self._writer.rule.min_tokens)

    def _allowed(self, sequence: Sequence) -> frozenset[Action]:
        group, ttt = sequence.group, sequence.group.ttt
        ahead = group.chunks_ahead(sequence)
        return _session(group).ledger.allowed(self.costs[ttt.cost_model], ttt.budget, ahead)

    def _gate(self, ttt: ResolvedTTT) -> Gate:
        match ttt.gate:
            case "fixed":
                return FixedGate(ttt.action)
            case "random":
                return RandomGate()
            case "threshold":
                return ThresholdGate()
            case "policy":
                if self._policy is None:
                    raise RuntimeError("gate 'policy' was admitted without a policy")
                return self._policy
            case "off":
                return OffGate()

    def begin(self, pending: PendingWrite) -> Write:
        """Start the write from the version that the session has now."""
        sequence, span = pending.sequence, pending.span
        session = _session(sequence.group)
        start = max(span.start - 1, 0)
        if sequence.boundary is None:
            raise RuntimeError("a sequence with chunks keeps boundary activations")
        version = self._bank.version(session.slot)
        pending.write = Write(
            tag=StepTag(session.slot, session.owner, version, "WRITE"),
            action=pending.action,
            cache=sequence.cache,
            start=start,
            boundary=sequence.boundary[start : span.end - 1],
            targets=tensor_on(self._model.device, sequence.tokens[start + 1 : span.end]),
            staged=self._bank.state(session.slot, session.owner),
            top=pending.top if version == pending.read_version else None,
        )
        pending.top = None
        return pending.write

    def _reconsider(self, group: Group) -> None:
        """Before a write begins: what have other requests of the session learned and spent?"""
        pending, session = group.write, _session(group)
        if pending is None or pending.write is not None:
            return
        if session.has_learned(pending.chunk):
            pending.action, pending.reason = Action.SKIP, "seen"
        else:
            action = within_budget(pending.action, self._allowed(pending.sequence))
            if action is not pending.action:
                pending.action, pending.reason = action, "budget"
        if pending.action is Action.SKIP:
            group.write = None
            self._report(group, session, pending)

    def step(self, groups: Seq[Group]) -> tuple[tuple[StepTag, ...], int]:
        """One gradient step of each group's write; finished ones are committed or rolled back.

        Returns:
            Owners and versions of the writes, and their rows; a write whose reason has gone
            meanwhile is not among them.
        """
        begun = time.perf_counter()
        for group in groups:
            self._reconsider(group)
        groups = [group for group in groups if group.write is not None]
        if not groups:
            return (), 0
        pendings = [group.write for group in groups if group.write is not None]
        writes = [pending.write or self.begin(pending) for pending in pendings]
        tags = tuple(write.tag for write in writes)
        try:
            self._writer.step(writes)
        except Exception:
            # Out of memory, most likely. The staged states are private, so nothing is half done.
            _LOG.exception("a write failed; it is rolled back and its requests go on")
            for write in writes:
                write.failure = "error"
        seconds = time.perf_counter() - begun
        rows = sum(write.rows for write in writes)
        for group, pending, write in zip(groups, pendings, writes, strict=True):
            pending.seconds += seconds * write.rows / rows
            if write.finished:
                self._conclude(group, pending, write)
        return tags, rows

    def _conclude(self, group: Group, pending: PendingWrite, write: Write) -> None:
        session = _session(group)
        if write.failure is None:
            session.version = self._bank.commit(write.tag, write.staged)
            for key in self._keys(pending.sequence, pending.span)[:-1]:
                session.remember(key)
            session.remember(pending.chunk, pending.span.end - pending.span.start)
        else:
            session.rollbacks += 1
        group.write = None
        self._report(group, session, pending)

    def _report(self, group: Group, session: Session, pending: PendingWrite) -> None:
        action, write = pending.action, pending.write
        failure = write.failure if write is not None else None
        nominal = self.costs["nominal"][action]
        report = ChunkReport(
            index=len(group.reports),
            phase=pending.span.phase,
            start=pending.span.start,
            end=pending.span.end,
            action=action,
            reason="rolled_back" if failure else pending.reason,
            loss_before=pending.loss_before,
            loss_after=write.losses[-1] if write is not None and failure is None else None,
            cost=self.costs[group.ttt.cost_model][action],
            nominal=nominal,
            measured=self.costs["measured"][action],
            seconds=pending.seconds,
            document=pending.sequence.document,
            rollback=failure,
        )
        session.record(pending.loss_before, nominal)
        budgeted = group.ttt.gate != "off" and group.ttt.budget is not None
        session.ledger.charge(action, self.costs, pending.seconds, budgeted=budgeted)
        group.reports.append(report)
        self.observer.chunk(report)
        group.sink(ChunkEvent(report))


def _session(group: Group) -> Session:
    if group.session is None:
        raise RuntimeError(f"request {group.id} has chunks but no fast weights")
    return group.session
