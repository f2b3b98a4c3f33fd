"""A call's events, gathered into one answer."""

from __future__ import annotations

from contextlib import aclosing

from ponderttt.engine.outputs import (
    DoneEvent,
    Event,
    FinishEvent,
    PromptEvent,
    TokenEvent,
)
from server.events import Events
from server.replies import Outcome


def take(outcome: Outcome, prompt: int, event: Event) -> None:
    """Enter one event of the request for `prompt`."""
    match event:
        case TokenEvent():
            outcome.choices[prompt][event.index].add(event)
        case FinishEvent():
            outcome.choices[prompt][event.index].reason = event.reason
        case PromptEvent():
            outcome.scored[prompt] = event
        case DoneEvent():
            outcome.prompt_tokens += event.prompt_tokens
            outcome.cached_tokens += event.cached_tokens
            outcome.generated_tokens += event.generated_tokens
            outcome.reports[prompt] = event.ttt
        case _:
            pass


async def collect(events: Events, prompts: int, n: int) -> Outcome:
    """Listen to the end.

    Args:
        events: closed afterwards, in any case.
        prompts: number of requests.
        n: sequences per request.
    Raises:
        Exception: the error of a request that fails.
    """
    outcome = Outcome.empty(prompts, n)
    try:
        async with aclosing(events.listen()) as heard:
            async for prompt, event in heard:
                take(outcome, prompt, event)
    finally:
        await events.aclose()
    return outcome
