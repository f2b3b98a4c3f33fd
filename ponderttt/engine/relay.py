"""Generation by somebody else: hands sequences over and takes their tokens in.

With `adapt_on: generated` a text is continued chunk by chunk: each chunk comes back, is read and
learned here, and the next one is drawn with what was learned. Everything runs in the engine's
thread.
"""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from pathlib import Path

from torch import Tensor

from ponderttt.engine.emitter import Emitter
from ponderttt.engine.generator import Adapter, Arrival, Continuation, Drawn, Failed, Generator
from ponderttt.engine.learner import Learner
from ponderttt.engine.request import GenerateRequest
from ponderttt.engine.sequence import Group, Sequence, Span, Status
from ponderttt.fast_weights.layout import AdapterLayout
from ponderttt.fast_weights.peft_format import export_adapter
from ponderttt.sessions.manager import SessionManager
from ponderttt.sessions.session import Session

_LOG = logging.getLogger(__name__)


class Relay:
    """Between the engine's sequences and a generator's continuations.

    Args:
        generator: continues texts.
        emitter, learner, sessions: the engine's.
        layout: of the fast weights.
        end_ids: tokens that end a text.
        model_name: base model that published adapters state.
    """

    def __init__(
        self,
        generator: Generator,
        emitter: Emitter,
        learner: Learner,
        sessions: SessionManager,
        layout: AdapterLayout,
        end_ids: frozenset[int],
        model_name: str,
    ) -> None:
        self.generator = generator
        self._emitter = emitter
        self._learner = learner
        self._sessions = sessions
        self._layout = layout
        self._end_ids = end_ids
        self._model_name = model_name
        self._fresh = sessions.fresh_digest()
        self._handed: dict[str, Sequence] = {}

    # --- out ---------------------------------------------------------------------------------

    def is_due(self, group: Group) -> bool:
        """Whether a sequence of the group waits to be handed over."""
        return group.write is None and any(_waits(s) for s in group.sequences)

    def hand_over(self, group: Group) -> None:
        """Have the sequences that wait for it continued, with the session's weights of now."""
        session, adapter = group.session, None
        if session is not None:
            read = session.version == group.version_before
            adapter = self._adapter(session, group.digest if read else "")
        for sequence in group.sequences:
            if _waits(sequence):
                continuation = self._continuation(sequence, adapter)
                sequence.continuation = continuation.id
                self._handed[continuation.id] = sequence
                self.generator.start(continuation)

    def _continuation(self, sequence: Sequence, adapter: Adapter | None) -> Continuation:
        request, ttt = sequence.group.request, sequence.group.ttt
        if not isinstance(request, GenerateRequest):
            raise RuntimeError("only requests that generate are handed over")
        sampling, done = request.sampling, sequence.generated
        left = sampling.max_tokens - done
        if ttt.learns_generated and ttt.when == "inline":
            left = min(left, ttt.chunk_size - done % ttt.chunk_size)
        ends = () if sampling.ignore_eos else tuple(sorted(self._end_ids))
        return Continuation(
            id=f"{sequence.group.id}-{sequence.index}-{done}",
            tokens=tuple(sequence.tokens),
            max_tokens=left,
            sampling=sampling,
            seed=part_seed(sampling.seed, sequence.index, done),
            stop_ids=(*sampling.stop_token_ids, *ends),
            adapter=adapter,
        )

    def _adapter(self, session: Session, digest: str = "") -> Adapter | None:
        """The session's weights of now; their digest is taken where it is not known."""
        state = self._sessions.state(session)
        digest = digest or state.digest()
        if digest == self._fresh:
            return None  # they change nothing: the base model, whose slots are not limited
        write = partial(_export, self._layout, state.weights, self._model_name)
        return Adapter(session.owner, session.version, digest, write)

    def retire(self, group: Group) -> None:
        """The request has ended, however: nothing more is drawn for it.

        What it has learned is published, so that the session's next request finds it loaded.
        """
        for sequence in group.sequences:
            self._cancel(sequence)
        session = group.session
        if session is None:
            return
        if session.ephemeral:
            self.generator.forget(session.owner)
        elif any(report.action.steps and not report.rollback for report in group.reports):
            self._publish(session)

    def _publish(self, session: Session) -> None:
        try:
            adapter = self._adapter(session)
        except Exception:  # no memory, most likely; the next request hears of it
            _LOG.exception("session %s is not published ahead", session.owner)
            return
        if adapter is not None:
            self.generator.publish(adapter)

    def _cancel(self, sequence: Sequence) -> None:
        if sequence.continuation is not None:
            del self._handed[sequence.continuation]
            self.generator.cancel(sequence.continuation)
            sequence.continuation = None

    # --- in ----------------------------------------------------------------------------------

    def take_in(self) -> dict[Group, Exception | None]:
        """Enter what has arrived; tells whose requests it concerned, and which of them failed."""
        touched: dict[Group, Exception | None] = {}
        for arrival in self.generator.arrivals():
            sequence = self._handed.get(arrival.id)
            if sequence is None or touched.get(sequence.group) is not None:
                continue  # cancelled, or failed a moment ago
            touched[sequence.group] = None
            try:
                self._take(sequence, arrival)
            except Exception as error:  # whatever it is, it concerns this request alone
                touched[sequence.group] = error
        return touched

    def _take(self, sequence: Sequence, arrival: Arrival) -> None:
        if isinstance(arrival, Failed):
            raise arrival.error
        if isinstance(arrival, Drawn):
            for token in arrival.tokens:
                self._emitter.take(sequence, token)
                if sequence.status is Status.FINISHED:
                    self._cancel(sequence)
                    self._learn_rest(sequence)
                    return
            return
        del self._handed[arrival.id]
        sequence.continuation = None
        if arrival.stopped:
            self._emitter.stop(sequence)
            self._learn_rest(sequence)
        elif self._fills_chunk(sequence):
            self._learn(sequence, len(sequence.tokens))

    def _fills_chunk(self, sequence: Sequence) -> bool:
        ttt = sequence.group.ttt
        learns = ttt.learns_generated and ttt.when == "inline"
        return learns and sequence.generated > 0 and sequence.generated % ttt.chunk_size == 0

    def _learn_rest(self, sequence: Sequence) -> None:
        """The text has ended: its last chunk, short or not, is still to be learned."""
        group = sequence.group
        ttt, session = group.ttt, group.session
        # Weights that live for this request only have no reader left.
        if session is None or session.ephemeral:
            return
        if ttt.learns_generated and ttt.when == "inline" and sequence.generated:
            self._learn(sequence, sequence.read_end)

    def _learn(self, sequence: Sequence, end: int) -> None:
        """Have the generated chunk that ends at `end` read, then the gate asked about it."""
        size, prompt = sequence.group.ttt.chunk_size, sequence.prompt_len
        start = prompt + (end - 1 - prompt) // size * size if end > prompt else prompt
        finished = sequence.status is Status.FINISHED
        if start < sequence.computed or (
            finished and self._learner.is_short(end - start, sequence.group.ttt)
        ):
            return  # learned already, or too short to be
        sequence.spans.append(Span(start, end, "generated"))
        sequence.status = Status.PREFILL


def part_seed(seed: int | None, index: int, done: int) -> int | None:
    """Seed of a part of a text that begins after `done` tokens of sibling `index`.

    The first part of the first sibling has the caller's own. Later parts must not draw the same
    numbers again, so theirs are hashed from it.
    """
    if seed is None or (index == 0 and done == 0):
        return seed
    key = hashlib.blake2b(f"{seed}/{index}/{done}".encode(), digest_size=8).digest()
    return int.from_bytes(key) >> 1


def _waits(sequence: Sequence) -> bool:
    return sequence.status is Status.REMOTE and sequence.continuation is None


def _export(layout: AdapterLayout, weights: Tensor, model_name: str, directory: Path) -> None:
    export_adapter(layout, weights, directory, model_name)
