"""Streams of server-sent events, from bytes as they come."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from clients.wire import (
    AnswerError,
    BrokenAnswerError,
    ServerError,
    foreign,
    media_type,
    snippet,
)

_DONE = "[DONE]"


def check_stream(response: httpx.Response) -> None:
    """Refuse an answer that can't be a stream of events.

    Raises:
        AnswerError: it is a page or a single object.
    """
    if media_type(response) in ("text/html", "application/json"):
        raise foreign(response, "no stream of events")


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


def _event(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise AnswerError(0, f"the server sent an event that is no JSON object: {snippet(text)}")
    if "error" in value and value["error"] is not None:
        said = value["error"]
        message = said.get("message", said) if isinstance(said, Mapping) else said
        raise ServerError(0, str(message))
    return value
