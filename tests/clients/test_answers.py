"""Answers with fields of other types than an OpenAI-compatible endpoint's."""

from __future__ import annotations

from typing import Any

import pytest

from clients.answers import LessonReader, chunks, completion, server_settings, session_state
from clients.wire import AnswerError, BrokenAnswerError
from tests.clients.bench.functional.fake_coder import report

INF, NAN = float("inf"), float("nan")


def answer(**fields: Any) -> dict[str, Any]:
    """A completion with further fields."""
    return {"choices": [{"index": 0, "text": "x", "finish_reason": "stop"}], **fields}


def learned(**fields: Any) -> dict[str, Any]:
    """What our server says of learning, changed."""
    return {"ttt": report({}) | fields}


COST = {"nominal": 1.0, "measured": 1.0, "seconds": 0.1, "chunks": 2}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"usage": {"prompt_tokens": "10", "completion_tokens": "5"}},
         "answer's usage.prompt_tokens is '10', not a number"),
        ({"usage": {"prompt_tokens": True}}, "usage.prompt_tokens is True, not a number"),
        ({"usage": {"completion_tokens": [5]}}, r"usage.completion_tokens is \[5\], not a number"),
        ({"usage": "much"}, "usage is 'much', not an object"),
        ({"ttt": {}}, "ttt.gate is missing"),
        ({"ttt": [1]}, "ttt is .*, not an object"),
        (learned(cost={"chunks": 1}), "ttt.cost.nominal is missing"),
        (learned(cost=COST | {"chunks": "x"}), "ttt.cost.chunks is 'x', not a whole number from 0"),
        (learned(cost=COST | {"measured": "x"}), "ttt.cost.measured is 'x', not a number"),
        (learned(chunks=None), "ttt.chunks is None, not a list"),
        (learned(chunks=[{"action": 3, "reason": "x"}]), r"chunks\[0\].action is 3, not a text"),
        (learned(choice={"read": None}), "ttt.choice.read is None, not a text"),
    ],
)  # fmt: skip
def test_fields_of_wrong_types_are_named(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(AnswerError, match=told):
        completion(answer(**fields), 1.0)
    with pytest.raises(AnswerError, match=told):
        list(chunks(answer(**fields), 1.0))


def test_texts_of_what_was_learned_may_be_long() -> None:
    assert completion(answer(**learned(gate="x" * 99)), 1.0).ttt is not None


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ({"text": "x", "finish_reason": 3}, "finish_reason is 3, not a text"),
        ({"text": "x", "index": "a"}, "index is 'a', not a whole number"),
        (
            {"text": "x", "logprobs": {"tokens": ["x"], "token_logprobs": ["a"],
                                       "text_offset": [0]}},
            r"logprobs.token_logprobs\[0\] is 'a', not a number",
        ),
        (
            {"text": "x", "logprobs": {"content": [{"token": "x", "logprob": "a"}]}},
            r"logprob\[0\] is 'a', not a number",
        ),
    ],
)  # fmt: skip
def test_choices_with_parts_of_wrong_types_are_named(choice: dict[str, Any], told: str) -> None:
    with pytest.raises(AnswerError, match=told):
        list(chunks({"choices": [choice]}, 1.0))


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        (None, (None, None)),
        ({}, (None, None)),
        ({"prompt_tokens": None, "completion_tokens": None}, (None, None)),
        ({"prompt_tokens": 3, "completion_tokens": None}, (3, 0)),
        ({"prompt_tokens": 3.0}, (3, 0)),
        ({"prompt_tokens": INF, "completion_tokens": NAN}, (None, None)),
        ({"prompt_tokens": -1, "completion_tokens": 2}, (None, 2)),
    ],
)
def test_numbers_that_count_nothing_are_none(
    usage: object, counts: tuple[int | None, int | None]
) -> None:
    (chunk,) = chunks(answer(usage=usage), 1.0)
    assert (chunk.prompt_tokens, chunk.completion_tokens) == counts
    whole = completion(answer(usage=usage), 1.0)
    assert (whole.prompt_tokens, whole.completion_tokens) == tuple(each or 0 for each in counts)


def test_what_was_learned_holds_nothing_that_json_can_not() -> None:
    ttt = learned(cost=COST | {"measured": NAN, "seconds": INF})
    found = completion(answer(**ttt), 1.0).ttt
    assert found is not None
    assert (found["cost"]["measured"], found["cost"]["seconds"]) == (None, None)


def test_tokens_read_before_are_told_of_whole_answers_too() -> None:
    usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
    assert completion(answer(usage=usage), 1.0).cached_tokens == 4
    assert completion(answer(usage={"prompt_tokens": 9}), 1.0).cached_tokens is None


def test_piece_without_an_index_is_of_the_first_choice() -> None:
    (chunk,) = chunks({"choices": [{"index": None, "text": "x"}]}, 1.0)
    assert chunk.index == 0


@pytest.mark.parametrize(
    ("tokens", "told", "offsets"),
    [
        (["a", "bc", "d"], [-1, -1, -1], (0, 1, 3)),
        (["a", "bc", "d"], None, (0, 1, 3)),
        (["<s>", "abc", "d"], [-1, -1, -1], (-1, -1, -1)),
        (["<s>", "abc", "d"], [0, 0, 3], (0, 0, 3)),
    ],
)
def test_places_of_tokens_are_those_in_the_text_where_the_server_gives_none(
    tokens: list[str], told: object, offsets: tuple[int, ...]
) -> None:
    logprobs = {"tokens": tokens, "token_logprobs": [None, -1.0, -2.0], "text_offset": told}
    (choice,) = completion({"choices": [{"text": "abcd", "logprobs": logprobs}]}, 1.0).choices
    assert choice.logprobs is not None
    assert choice.logprobs.text_offset == offsets


CHUNK = {
    "object": "session.adaptation.chunk", "action": "SKIP", "reason": "budget", "tokens": [0, 5],
    "nominal": 1.0, "measured": 1.0, "loss_before": 2.0, "loss_after": None,
}  # fmt: skip
REPORT = {
    "object": "session.adaptation", "gate": "policy", "tokens": 5, "version_before": 0,
    "version_after": 0, "cost": COST, "documents": [{"path": "a", "tokens": 5}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("event", "told"),
    [
        ({"action": "SKIP"}, "no usable field 'object'"),
        (CHUNK | {"action": None}, "event.action is None, not a text"),
        (CHUNK | {"tokens": [3]}, r"event.tokens is \[3\], not two whole numbers"),
        (CHUNK | {"measured": NAN}, "event.measured is nan, not a number"),
        (REPORT | {"gate": 1}, "event.gate is 1, not a text"),
        (REPORT | {"cost": COST | {"nominal": NAN}}, "event.cost.nominal is nan, not a number"),
        (REPORT | {"cost": {}}, "event.cost.nominal is missing"),
        (REPORT | {"documents": [{}]}, r"event.documents\[0\].tokens is missing"),
    ],
)
def test_events_of_a_lesson_with_wrong_fields_are_named(event: dict[str, Any], told: str) -> None:
    with pytest.raises(AnswerError, match=told):
        LessonReader().read(event)


def test_lesson_ends_with_a_report() -> None:
    reader = LessonReader()
    assert reader.read(CHUNK | {"loss_before": NAN})["loss_before"] is None
    # Of a later version.
    reader.read({"object": "session.adaptation.pause"})
    with pytest.raises(BrokenAnswerError, match="without a report"):
        reader.finish()
    reader.read(REPORT)
    reader.finish()


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"version": "1"}, "session.version is '1', not a whole number"),
        ({"chunks": NAN}, "session.chunks is nan, not a whole number"),
        ({"digest": 3}, "session.digest is 3, not a text"),
        ({"cost": {"nominal": 1.0}}, "session.cost.measured is missing"),
    ],
)
def test_session_with_wrong_fields_is_named(state: dict[str, Any], told: str) -> None:
    with pytest.raises(AnswerError, match=told):
        session_state({"id": "s"} | state)


def test_settings_of_the_server_hold_nothing_that_json_can_not() -> None:
    card = {"id": "m", "ttt": {"gate": "policy", "rule": {"learning_rate": NAN, "steps": [INF]}}}
    assert server_settings({"data": [card]}, None) == {
        "server.gate": "policy", "server.rule.learning_rate": None, "server.rule.steps": [None],
    }  # fmt: skip
