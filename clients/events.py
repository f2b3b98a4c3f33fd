"""Streams of server-sent events, from bytes as they come."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from clients.wire import (
    AnswerError,
    BrokenAnswerError,
    ServerError,
    SlowError,
    error_in,
    foreign,
    json_object,
    media_type,
    snippet,
)

_DONE = "[DONE]"


def may_stream(response: httpx.Response) -> bool:
    """Whether an answer can be a stream of events: it is no page and no single object."""
    return media_type(response) not in ("text/html", "application/json")


def no_stream(response: httpx.Response) -> ServerError:
    """What to raise for one that can't, which must have been read: the server may say why."""
    try:
        json_object(response)
    except AnswerError:
        pass
    except ServerError as error:
        return error
    return foreign(response, "no stream of events")


@dataclass(slots=True)
class EventParser:
    """Server-sent events from bytes as they come.

    Lines are split at line feeds only: generated text may hold other characters that Unicode
    counts as ends of lines.

    Attributes:
        done: the stream has ended as it should.
        count: events so far.
    """

    done: bool = False
    count: int = 0
    _pending: bytearray = field(default_factory=bytearray)
    _data: list[str] = field(default_factory=list)

    def feed(self, piece: bytes) -> Iterator[dict[str, Any]]:
        """The objects that are complete with this piece.

        Raises:
            ServerError: an event says that the server has failed.
            AnswerError: an event is no JSON object.
        """
        self._pending += piece
        *lines, rest = self._pending.split(b"\n")
        self._pending = bytearray(rest)
        for raw in lines:
            line = raw.removesuffix(b"\r").decode("utf-8", "replace")
            if line.startswith("data:"):
                self._data.append(line.removeprefix("data:").removeprefix(" "))
            elif not line and self._data:
                text, self._data = "\n".join(self._data), []
                if text.strip() == _DONE:
                    self.done = True
                if self.done:
                    return
                self.count += 1
                yield _event(text)

    def finish(self) -> None:
        """No more bytes come.

        Raises:
            BrokenAnswerError: the stream has not ended as it should.
        """
        # The last line may lack its end.
        rest = self._pending.decode("utf-8", "replace").removeprefix("data:")
        if not self.done and "".join([*self._data, rest]).strip() != _DONE:
            raise BrokenAnswerError(
                0, f"the server broke off in the middle of its answer (after {self.count} events)"
            )


@dataclass(slots=True)
class Patience:
    """Ends a stream that goes on without bringing anything.

    Comments (`: ping`) and pieces of an event that never ends keep a connection alive, but are no
    news; neither is an event whose `progress` is no further than that of those before it.

    Args:
        base_url: of the server, for the message.
        seconds: that may pass from one piece of news to the next.
    """

    base_url: str
    seconds: float
    _heard: float = field(init=False)
    _done: float = -1
    _total: float | None = None

    def __post_init__(self) -> None:
        self._heard = time.monotonic()

    def note(self, event: Mapping[str, Any]) -> None:
        """An event has come, and whoever asked for it is done with it."""
        progress = progress_of(event)
        if progress is not None:
            done, total = progress
            # One that grows as fast as what is done is never reached.
            self._total = total if self._total is None else self._total
            if not self._done < done <= self._total:
                return
            self._done = done
        self._heard = time.monotonic()

    def check(self) -> None:
        """Bytes have come.

        Raises:
            SlowError: there was no news for too long.
        """
        if time.monotonic() - self._heard > self.seconds:
            raise SlowError(
                0,
                f"{self.base_url} sent nothing new for {self.seconds:g} s in the middle of its "
                "answer; it may be busy: wait, or allow more time",
            )


def progress_of(event: Mapping[str, Any]) -> tuple[float, float] | None:
    """What is done and of how much; None where the event doesn't say it in two numbers."""
    match event.get("progress"):
        case [int() | float() as done, int() | float() as total]:
            return done, total
    return None


def _event(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise AnswerError(0, f"the server sent an event that is no JSON object: {snippet(text)}")
    said = error_in(value)
    if said is not None:
        raise ServerError(0, said)
    return value
