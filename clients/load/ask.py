"""One request, measured.

Times count from when the request was due: what a busy client adds is in them, too, and told as
`lag`. A server's queue, its reading of the prompt and its first learning all lie before the first
token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from clients.answers import CompletionChunk
from clients.async_api import AsyncClient
from clients.load.workload import Turn
from clients.wire import RETRYABLE, ServerError, SlowError

# Of a stream, in one of its pieces alone.
_TOLD_ONCE = ("prompt_tokens", "completion_tokens", "cached_tokens", "ttt")
Outcome = Literal["ok", "rejected", "timeout", "failed"]


@dataclass(frozen=True, slots=True)
class Asking:
    """What all requests have in common.

    Args:
        model: as the server names it.
        temperature: 0 is greedy.
        ttt: options of test-time training; `{n}` in the session's name stands for its number.
        extra: further fields of the body.
        timeout: seconds for a whole request.
        sessions: users `n` and `n + sessions` share a session.
    """

    model: str
    temperature: float
    ttt: Mapping[str, Any] | None
    extra: Mapping[str, Any] | None
    timeout: float
    sessions: int

    def ttt_of(self, user: int) -> dict[str, Any] | None:
        """What a user's requests say."""
        if self.ttt is None:
            return None
        return {
            name: value.replace("{n}", str(user % self.sessions)) if name == "session" else value
            for name, value in self.ttt.items()
        }


@dataclass(slots=True)
class Measured:
    """What came of one request; seconds, from when it was due.

    Args:
        outcome: `rejected` is 429 or 503, `timeout` that it took too long, `failed` all else.
        error: why it isn't ok.
        retry_after: seconds that the server asks to wait.
        first, last: when the first and the last text came; None if there was none.
        gap: longest wait between two pieces of text.
        pieces: of text.
        seconds: until the end.
    """

    outcome: Outcome = "ok"
    error: str | None = None
    retry_after: float | None = None
    first: float | None = None
    last: float | None = None
    gap: float = 0.0
    pieces: int = 0
    seconds: float = 0.0
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    ttt: dict[str, Any] | None = None

    @property
    def tokens(self) -> int:
        """Generated; where the server doesn't count, pieces of text."""
        return self.pieces if self.completion_tokens is None else self.completion_tokens

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None of fewer than two tokens."""
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)

    def add(self, chunk: CompletionChunk, at: float) -> None:
        """A piece that came `at` seconds after the request was due."""
        self.finish_reason = chunk.finish_reason or self.finish_reason
        if chunk.text:
            if self.last is not None:
                self.gap = max(self.gap, at - self.last)
            self.first = at if self.first is None else self.first
            self.last = at
            self.pieces += 1
        for name in _TOLD_ONCE:
            value = getattr(chunk, name)
            if value is not None:
                setattr(self, name, value)

    def fields(self) -> dict[str, Any]:
        """For a record."""
        ok = self.outcome == "ok"
        return {
            "outcome": self.outcome,
            "ok": ok,
            "error": self.error,
            # A broken answer has a beginning, but is no measurement.
            "ttft": self.first if ok else None,
            "tpot": self.tpot if ok else None,
            "seconds": self.seconds if ok else None,
            "elapsed": self.seconds,
            "gap": self.gap if ok else None,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "counted": self.completion_tokens is not None,
            "cached_tokens": self.cached_tokens,
            "finish_reason": self.finish_reason,
            **_learned(self.ttt),
        }


def _learned(ttt: Mapping[str, Any] | None) -> dict[str, Any]:
    if ttt is None:
        return {}
    return {
        "chunks": len(ttt["chunks"]),
        "updates": sum(chunk["action"] != "SKIP" for chunk in ttt["chunks"]),
        "nominal": ttt["cost"]["nominal"],
        "measured": ttt["cost"]["measured"],
    }


async def ask(client: AsyncClient, asking: Asking, turn: Turn, due: float) -> Measured:
    """Make a request; never raises what the server does wrong.

    Args:
        client: that doesn't ask again by itself.
        asking: what all requests have in common.
        turn: this one.
        due: when, by `time.perf_counter`.
    """
    seen = Measured()
    try:
        async with (
            asyncio.timeout(asking.timeout),
            aclosing(
                client.stream(
                    turn.prompt,
                    model=asking.model,
                    max_tokens=turn.max_tokens,
                    temperature=asking.temperature,
                    ttt=asking.ttt_of(turn.user),
                    extra=asking.extra,
                    timeout=asking.timeout,
                )
            ) as chunks,
        ):
            async for chunk in chunks:
                seen.add(chunk, time.perf_counter() - due)
    except (TimeoutError, SlowError):
        seen.outcome, seen.error = "timeout", f"took longer than {asking.timeout:g} s"
    except ServerError as error:
        seen.outcome = "rejected" if error.status in RETRYABLE else "failed"
        seen.error, seen.retry_after = str(error), error.retry_after
    seen.seconds = time.perf_counter() - due
    if seen.outcome == "ok" and seen.finish_reason is None:
        seen.outcome, seen.error = "failed", "the answer has no end (finish_reason)"
    return seen
