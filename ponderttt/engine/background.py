"""Learning after the answer: the chunks of a finished request, to be learned in idle time.

The trunk is not run again: its hidden states are valid for every version of the fast weights, so
the successor reads the adaptive blocks only, chunk by chunk, and learns as an inline request would.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ponderttt.adaptation.chunking import chunk_spans
from ponderttt.engine.outputs import Event
from ponderttt.engine.sequence import Group, Sequence, Span


def background_group(done: Group, equip: Callable[[Sequence], None]) -> Group | None:
    """The request's successor in the background; None where there is nothing left to learn.

    Args:
        done: a request that has been answered.
        equip: gives a sequence that is to be read from its beginning a cache and buffers.
    """
    ttt = done.ttt
    if ttt.when != "background" or done.session is None or done.is_adapt:
        return None
    answered = done.sequences[0]
    spans: list[Span] = []
    if ttt.learns_prompt:
        prompt = chunk_spans(0, answered.prompt_len, ttt.chunk_size)
        spans += [Span(*span, "prompt") for span in prompt]
    if ttt.learns_generated:
        generated = chunk_spans(answered.prompt_len, answered.read_end, ttt.chunk_size)
        spans += [Span(*span, "generated") for span in generated]
    if not spans:
        return None
    end = spans[-1].end
    # Not so where somebody else has read it, to generate.
    was_read = answered.computed >= end and answered.boundary is not None
    successor = Group(done.request, done.session, done.named, ttt, _nobody_listens, background=True)
    successor.sequences.append(
        Sequence(
            successor,
            0,
            answered.tokens[:end],
            end,
            answered.cache,
            spans=deque(spans),
            boundary=answered.boundary,
            final=answered.final,
            known=end if was_read else 0,
        )
    )
    if not was_read:
        equip(successor.sequences[0])
    return successor


def _nobody_listens(event: Event) -> None:
    """The answer has been given."""
