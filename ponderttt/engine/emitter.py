"""From drawn tokens to text events: end of text, stop strings, lengths."""

from __future__ import annotations

import time

from ponderttt.engine.observer import EngineObserver
from ponderttt.engine.outputs import FinishEvent, FinishReason, TokenEvent
from ponderttt.engine.request import GenerateRequest
from ponderttt.engine.sampler import SampledToken
from ponderttt.engine.sequence import Sequence, Status


class Emitter:
    """Takes each sequence's drawn tokens and tells the caller what is certain.

    Args:
        end_ids: tokens that end a text.
        observer: hears of first and further tokens.
    """

    def __init__(self, end_ids: frozenset[int], observer: EngineObserver) -> None:
        self._end_ids = end_ids
        self.observer = observer

    def take(self, sequence: Sequence, token: SampledToken) -> None:
        """Append a drawn token; the sequence is FINISHED afterwards where it ends the text."""
        request = sequence.group.request
        if not isinstance(request, GenerateRequest) or sequence.sampler is None:
            raise RuntimeError("a token was drawn for a sequence that does not generate")
        sequence.tokens.append(token.token_id)
        sequence.sampler.observe(token.token_id)
        self._time(sequence)
        params = request.sampling
        ends = token.token_id in self._end_ids and not params.ignore_eos
        if ends or token.token_id in params.stop_token_ids:
            self._finish(sequence, "stop")
            return
        self._push(sequence, token)
        if sequence.detokenizer is not None and sequence.detokenizer.stopped:
            self._finish(sequence, "stop")
        elif sequence.generated >= params.max_tokens:
            self._finish(sequence, "length")

    def end(self, sequence: Sequence) -> None:
        """Finish a sequence that was to generate nothing."""
        self._finish(sequence, "length")

    def stop(self, sequence: Sequence) -> None:
        """Finish a sequence that was stopped by whoever draws its tokens."""
        self._finish(sequence, "stop")

    def _time(self, sequence: Sequence) -> None:
        now = time.monotonic()
        group = sequence.group
        if group.first_token_at is None:
            group.first_token_at = now
            self.observer.first_token(now - group.request.arrival)
        elif sequence.last_token_at is not None:
            self.observer.next_token(now - sequence.last_token_at)
        sequence.last_token_at = now

    def _push(self, sequence: Sequence, token: SampledToken) -> None:
        detokenizer = sequence.detokenizer
        if detokenizer is None:
            raise RuntimeError("a sequence that generates has a detokenizer")
        text = detokenizer.push(token.token_id)
        sequence.held.append((detokenizer.offsets[-1], token))
        if text:
            self._emit(sequence, text, final=False)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        text = sequence.detokenizer.flush() if sequence.detokenizer is not None else ""
        self._emit(sequence, text, final=True)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        sequence.group.sink(FinishEvent(sequence.index, reason))

    def _emit(self, sequence: Sequence, text: str, *, final: bool) -> None:
        detokenizer = sequence.detokenizer
        if detokenizer is None:
            raise RuntimeError("a sequence that generates has a detokenizer")
        end = len(detokenizer.text)
        # Tokens of a stop string have no text of their own and are not reported.
        stopped = detokenizer.stopped
        ready = [held for held in sequence.held if held[0] < end or (final and not stopped)]
        sequence.held = sequence.held[len(ready) :]
        if not ready and not text:
            return
        request = sequence.group.request
        wants = isinstance(request, GenerateRequest) and request.sampling.logprobs is not None
        sequence.group.sink(
            TokenEvent(
                index=sequence.index,
                text=text,
                token_ids=tuple(token.token_id for _, token in ready),
                logprobs=tuple(token for _, token in ready) if wants else (),
                offsets=tuple(offset for offset, _ in ready),
            )
        )
