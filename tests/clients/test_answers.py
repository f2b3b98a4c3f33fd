"""Answers with fields of other types than an OpenAI-compatible endpoint's."""

from __future__ import annotations

from typing import Any

import pytest

from clients.answers import chunks, completion
from clients.wire import AnswerError
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
        (learned(gate="x" * 99), None),
    ],
)  # fmt: skip
def test_fields_of_wrong_types_are_named(fields: dict[str, Any], told: str | None) -> None:
    if told is None:
        assert completion(answer(**fields), 1.0).ttt is not None
        return
    with pytest.raises(AnswerError, match=told):
        completion(answer(**fields), 1.0)
    with pytest.raises(AnswerError, match=told):
        list(chunks(answer(**fields), 1.0))


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
