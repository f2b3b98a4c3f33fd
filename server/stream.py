"""A call's events, sent on as they come."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ponderttt.engine.outputs import DoneEvent, FinishEvent, PromptEvent, TokenEvent
from server.collect import take
from server.events import Events
from server.replies import Outcome, Reply


async def stream_reply(
    reply: Reply, events: Events, prompts: int, n: int, usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    """The objects of a streamed answer.

    `ttt` comes in the last one: where usage is asked for, the one that has it; else the one that
    ends the last choice, which therefore waits for the request's account.

    Args:
        reply: their form.
        events: of all prompts.
        prompts, n: number of requests, and of sequences in each.
        usage: end with an object without choices that counts tokens.
    """
    outcome = Outcome.empty(prompts, n)
    opened: set[int] = set()
    held: dict[str, Any] | None = None
    unfinished = prompts * n

    def wrap(choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = reply.head
        chunk = {
            "id": head.id,
            "object": reply.stream_object,
            "created": head.created,
            "model": head.model,
            "choices": choices,
        }
        return chunk | {"usage": None} if usage else chunk

    async with aclosing(events.listen()) as heard:
        async for prompt, event in heard:
            # Only what the end needs is kept: a stream's text need not pile up here.
            if isinstance(event, PromptEvent | DoneEvent):
                take(outcome, prompt, event)
            if not isinstance(event, TokenEvent | FinishEvent):
                continue
            index = prompt * n + event.index
            if index not in opened:
                opened.add(index)
                if (first := reply.opening(prompt, outcome.scored[prompt])) is not None:
                    yield wrap([{"index": index, **first}])
            if isinstance(event, TokenEvent):
                yield wrap([{"index": index, **reply.piece(prompt, event)}])
                continue
            unfinished -= 1
            end = wrap([{"index": index, **reply.ending(event.reason)}])
            if unfinished or usage:
                yield end
            else:
                held = end
    ttt = _dump_ttt(outcome)
    if usage:
        yield wrap([]) | {"usage": outcome.usage.model_dump(mode="json"), "ttt": ttt}
    elif held is not None:
        yield held | {"ttt": ttt}


def _dump_ttt(outcome: Outcome) -> Any:
    ttt = outcome.ttt
    if isinstance(ttt, list):
        return [each.model_dump(mode="json") if each is not None else None for each in ttt]
    return ttt.model_dump(mode="json") if ttt is not None else None
