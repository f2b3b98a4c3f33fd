"""From drawn tokens to events, token by token, with a tokenizer of letters."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.config import TTTDefaults
from ponderttt.engine.detokenizer import IncrementalDetokenizer
from ponderttt.engine.emitter import Emitter
from ponderttt.engine.outputs import Event, FinishEvent, TokenEvent
from ponderttt.engine.request import GenerateRequest
from ponderttt.engine.resolve import resolve_ttt
from ponderttt.engine.sampler import SampledToken
from ponderttt.engine.sampler_state import SamplerState
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.engine.sequence import Group, Sequence, Status
from ponderttt.models.kv_cache import KVCache
from tests.ponderttt.engine.harness import Recorder

END = 0
CACHE = KVCache(1, 1, 1, 1, torch.device("cpu"), torch.float32)
TTT = resolve_ttt(TTTParams(), TTTParams(), TTTDefaults(), "off", False)


class Letters:
    """Token 0 ends a text and has none; any other is the character of its number."""

    def decode(self, ids: Seq[int], skip_special_tokens: bool) -> str:
        """Text of `ids`."""
        shown = [i for i in ids if i != END or not skip_special_tokens]
        return "".join("<end>" if i == END else chr(i) for i in shown)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for."""
        return b"" if token_id == END else chr(token_id).encode()


class Line:
    """One sequence and its emitter."""

    def __init__(self, **sampling: Any) -> None:
        params = SamplingParams(**({"max_tokens": 99, "seed": 1} | sampling))
        self.events: list[Event] = []
        self.recorder = Recorder()
        self.emitter = Emitter(frozenset({END}), self.recorder)
        request = GenerateRequest((65,), params, arrival=time.monotonic())
        group = Group(request, None, False, TTT, self.events.append)
        self.sequence = Sequence(group, 0, [65], 1, CACHE)
        self.sequence.status = Status.DECODE
        self.sequence.sampler = SamplerState(params, (65,))
        self.sequence.detokenizer = IncrementalDetokenizer(Letters(), params.stop)
        group.sequences.append(self.sequence)

    def take(self, text: str) -> None:
        for character in text:
            self.token(ord(character))

    def token(self, token: int) -> None:
        if self.sequence.status is not Status.FINISHED:
            self.emitter.take(self.sequence, SampledToken(token, -0.5))

    @property
    def pieces(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, TokenEvent)]

    @property
    def tokens(self) -> list[int]:
        return [t for e in self.events if isinstance(e, TokenEvent) for t in e.token_ids]

    @property
    def finish(self) -> str | None:
        last = self.events[-1] if self.events else None
        return last.reason if isinstance(last, FinishEvent) else None


def test_tokens_without_stop_strings_are_told_at_once() -> None:
    line = Line()
    line.take("abc")
    assert line.pieces == ["a", "b", "c"]
    assert line.finish is None
    assert line.sequence.tokens == [65, 97, 98, 99]


def test_tokens_that_may_be_part_of_a_stop_string_are_held_back() -> None:
    line = Line(stop=("xyz",))
    line.take("axy")
    assert line.pieces == ["a"]
    line.take("b")
    assert line.pieces == ["a", "xyb"]
    assert line.tokens == [ord(c) for c in "axyb"]
    offsets = [o for e in line.events if isinstance(e, TokenEvent) for o in e.offsets]
    assert offsets == [0, 1, 2, 3]


def test_stop_string_when_complete_is_left_out_with_its_tokens() -> None:
    line = Line(stop=("xyz",))
    line.take("axyz and more")
    assert line.pieces == ["a"]
    assert line.tokens == [ord("a")]
    assert line.finish == "stop"
    assert line.sequence.status is Status.FINISHED
    assert line.sequence.finish_reason == "stop"


@pytest.mark.parametrize("ending", ["end of text", "length"])
def test_held_back_text_is_told_when_the_text_ends_otherwise(ending: str) -> None:
    line = Line(stop=("xyz",), max_tokens=3 if ending == "length" else 9)
    line.take("axy")
    if ending == "end of text":
        line.token(END)
    assert "".join(line.pieces) == "axy"
    assert line.tokens == [ord(c) for c in "axy"]
    assert line.finish == ("length" if ending == "length" else "stop")


def test_end_of_text_is_not_told_unless_it_is_ignored() -> None:
    line = Line()
    line.take("a")
    line.token(END)
    assert (line.tokens, line.finish) == ([97], "stop")
    ignoring = Line(ignore_eos=True, max_tokens=3)
    ignoring.take("a")
    ignoring.token(END)
    ignoring.take("b")
    assert ignoring.tokens == [97, END, 98]
    assert "".join(ignoring.pieces) == "ab"
    assert ignoring.finish == "length"


def test_stop_token_ends_the_text_even_where_the_end_is_ignored() -> None:
    line = Line(stop_token_ids=(98,), ignore_eos=True)
    line.take("abc")
    assert (line.tokens, line.finish) == ([97], "stop")


def test_character_of_several_tokens_is_told_when_it_is_whole() -> None:
    class Bytes(Letters):
        def token_bytes(self, token_id: int) -> bytes:
            return bytes([token_id])

    line = Line()
    line.sequence.detokenizer = IncrementalDetokenizer(Bytes(), ())
    for byte in "é!".encode():
        line.token(byte)
    assert line.pieces == ["é", "!"]
    assert line.tokens == list("é!".encode())


def test_log_probabilities_come_only_where_they_were_asked_for() -> None:
    for wanted in (None, 0, 3):
        line = Line(logprobs=wanted)
        line.take("ab")
        counts = [len(e.logprobs) for e in line.events if isinstance(e, TokenEvent)]
        assert counts == ([0, 0] if wanted is None else [1, 1])


def test_end_of_a_sequence_that_generates_nothing_is_its_length() -> None:
    line = Line(max_tokens=0)
    line.emitter.end(line.sequence)
    assert line.events == [FinishEvent(0, "length")]


def test_times_between_tokens_are_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    line = Line()
    for step in (0.5, 0.25, 0.125):
        now += step
        line.take("a")
    assert line.recorder.first_tokens == [0.5]
    assert line.recorder.next_tokens == [0.25, 0.125]


def test_first_token_of_siblings_is_observed_once() -> None:
    line = Line(n=2)
    sibling = Sequence(line.sequence.group, 1, [65], 1, CACHE)
    sibling.sampler = SamplerState(SamplingParams(seed=1), (65,), child=1)
    sibling.detokenizer = IncrementalDetokenizer(Letters(), ())
    line.take("a")
    line.emitter.take(sibling, SampledToken(98, -0.5))
    assert len(line.recorder.first_tokens) == 1
    assert [e.index for e in line.events if isinstance(e, TokenEvent)] == [0, 1]
