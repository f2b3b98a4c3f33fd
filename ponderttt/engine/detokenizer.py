"""Turns generated tokens into text as they come, up to a stop string.

Works on the bytes of the tokens: an incremental UTF-8 decoder keeps at most the three bytes of an
unfinished character, so a token costs O(its bytes), however long the text and however broken its
bytes are. (Decoding a window of tokens again and again, as vLLM and TGI do, waits for a window
without U+FFFD, which a stream of invalid bytes never gives.)
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class Detokenizes(Protocol):
    """The part of a tokenizer needed here."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of `ids`."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; put together, those of a text are its UTF-8."""


class _StopMatcher:
    """Finds one stop string in a stream of characters, each looked at once on average.

    Source: Knuth, Morris and Pratt, SIAM J. Comput. 6(2), 1977.
    """

    __slots__ = ("_fallback", "_stop", "matched")

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self.matched = 0  # characters of the stop string that the text now ends with
        # fallback[i]: the longest proper prefix of the stop string that also ends stop[:i + 1].
        self._fallback = [0] * len(stop)
        for place in range(1, len(stop)):
            length = self._fallback[place - 1]
            while length and stop[place] != stop[length]:
                length = self._fallback[length - 1]
            self._fallback[place] = length + (stop[place] == stop[length])

    def completes(self, character: str) -> bool:
        """Take the next character; True if the stop string is complete with it."""
        while self.matched and self._stop[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        self.matched += self._stop[self.matched] == character
        return self.matched == len(self._stop)


class IncrementalDetokenizer:
    """Text of one sequence, given out as soon as nothing can take it back.

    Held back are the bytes of an unfinished character and whatever may be the beginning of a stop
    string. Special tokens (the end-of-text token among them) have no text. The text ends before
    the first stop string that is complete, wherever it lies in its token; of several complete at
    the same character, before the longest. So the result doesn't depend on how the text is cut
    into tokens.

    Args:
        tokenizer: gives the bytes of tokens, and says which are special.
        stop: strings that end the text, each of one character at least.
    Attributes:
        stopped: a stop string has occurred; from then on nothing is emitted.
        offsets: per token pushed, the index in the generated text of the first character that has
            a byte of it. Counted in the text as generated: a token within or after a stop string
            begins at or after `len(text)`.
    Raises:
        ValueError: a stop string is empty.
    """

    def __init__(self, tokenizer: Detokenizes, stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise ValueError("a stop string is empty; it would stop every text at its start")
        self.stopped = False
        self.offsets: list[int] = []
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._matchers = [_StopMatcher(text) for text in stop]
        self._emitted: list[str] = []
        self._held = ""
        self._generated = 0  # characters, stop string and what follows included

    @property
    def text(self) -> str:
        """All text emitted so far."""
        return "".join(self._emitted)

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that is certain now, often empty."""
        piece = self._bytes(token_id)
        unfinished, _ = self._decoder.getstate()
        new = self._decoder.decode(piece)
        # Bytes that don't continue the unfinished character turn it into U+FFFD and begin after it.
        broken = bool(unfinished and piece) and not _continues(unfinished, piece[0])
        lost = len(unfinished.decode(errors="replace")) if broken else 0
        self.offsets.append(self._generated + lost)
        return self._emit(new)

    def flush(self) -> str:
        """Return what was held back, since no token follows; an unfinished character as U+FFFD.

        Ends the sequence: push nothing afterwards.
        """
        emitted = self._emit(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        self._emitted.append(rest)
        return emitted + rest

    def _bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer.token_bytes(token_id)
        if self._tokenizer.decode([token_id], skip_special_tokens=True):
            return piece
        # No text: a special token, unless it has none in any case (sentencepiece strips the space
        # of a first token, and a lone space is nothing but that).
        special = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return b"" if special else piece

    def _emit(self, new: str) -> str:
        """Append decoded characters and return those that no stop string can claim any more."""
        self._generated += len(new)
        if self.stopped:
            return ""
        for place, character in enumerate(new):
            complete = [m.matched for m in self._matchers if m.completes(character)]
            if complete:
                self.stopped = True
                seen = self._held + new[: place + 1]
                certain, self._held = seen[: len(seen) - max(complete)], ""
                break
        else:
            seen = self._held + new
            keep = max((matcher.matched for matcher in self._matchers), default=0)
            certain, self._held = seen[: len(seen) - keep], seen[len(seen) - keep :]
        self._emitted.append(certain)
        return certain


def _continues(unfinished: bytes, byte: int) -> bool:
    """Whether `byte` may follow the beginning of a character in UTF-8."""
    if unfinished == b"\xed" and byte >= 0xA0:
        return False  # a surrogate; the decoder notices one byte later
    decoder = codecs.getincrementaldecoder("utf-8")(errors="strict")
    try:
        decoder.decode(unfinished + bytes([byte]))
    except UnicodeDecodeError:
        return False
    return True
