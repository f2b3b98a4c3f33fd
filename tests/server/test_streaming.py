"""Streams: the same text in pieces, usage, `ttt` at the end, failures on the way."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.server.live import PROMPT, Live
from tests.server.test_chat import MESSAGES

SAMPLED: dict[str, Any] = {"max_tokens": 20, "seed": 11, "temperature": 1}


def test_streamed_completion_is_the_same_text_in_pieces(live: Live) -> None:
    whole = live.openai.completions.create(
        model=live.model, prompt=[PROMPT, "x"], n=2, logprobs=1, **SAMPLED
    )
    chunks = list(
        live.openai.completions.create(
            model=live.model, prompt=[PROMPT, "x"], n=2, logprobs=1, stream=True, **SAMPLED
        )
    )
    assert len(chunks) > 40
    assert len({chunk.id for chunk in chunks}) == 1
    for expected in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == expected.index]
        assert "".join(part.text for part in parts) == expected.text
        assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1].finish_reason == expected.finish_reason
        assert expected.logprobs is not None
        for name in ("tokens", "token_logprobs", "text_offset"):
            joined = [x for part in parts if part.logprobs for x in getattr(part.logprobs, name)]
            if name == "token_logprobs":
                assert joined == pytest.approx(getattr(expected.logprobs, name), abs=1e-4)
            else:
                assert joined == getattr(expected.logprobs, name)


def test_stream_tells_what_was_learned_in_its_last_event_with_choices(live: Live) -> None:
    chunks = list(
        live.openai.completions.create(
            model=live.model,
            prompt=PROMPT * 3,
            stream=True,
            **SAMPLED,
            extra_body={"ttt": {"gate": "fixed", "chunk_size": 32}},
        )
    )
    assert all("ttt" not in (chunk.model_extra or {}) for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in chunks)
    report = (chunks[-1].model_extra or {})["ttt"]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert {chunk["action"] for chunk in report["chunks"]} >= {"UPDATE_1"}


def test_stream_with_usage_ends_with_an_event_that_counts(live: Live) -> None:
    chunks = list(
        live.openai.chat.completions.create(
            model=live.model,
            messages=MESSAGES,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
            **SAMPLED,
        )
    )
    *body, last = chunks
    assert all(chunk.usage is None for chunk in body)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 40
    assert last.usage.prompt_tokens_details is not None
    assert 0 <= (last.usage.prompt_tokens_details.cached_tokens or 0) < last.usage.prompt_tokens
    assert (last.model_extra or {})["ttt"]["gate"] == "threshold"
    assert [c.finish_reason for chunk in body for c in chunk.choices].count("length") == 2


def test_streamed_chat_begins_with_the_role_and_gives_the_same_text(live: Live) -> None:
    whole = live.openai.chat.completions.create(
        model=live.model, messages=MESSAGES, logprobs=True, **SAMPLED
    )
    chunks = list(
        live.openai.chat.completions.create(
            model=live.model, messages=MESSAGES, logprobs=True, stream=True, **SAMPLED
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    tokens = [
        token.token
        for chunk in chunks
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or []
    ]
    expected = whole.choices[0].logprobs
    assert expected is not None
    assert tokens == [token.token for token in expected.content or []]


def test_streamed_echo_begins_with_the_prompt_and_its_scores(live: Live) -> None:
    chunks = list(
        live.openai.completions.create(
            model=live.model, prompt=PROMPT, max_tokens=0, echo=True, logprobs=1, stream=True
        )
    )
    first = chunks[0].choices[0]
    assert first.text == PROMPT
    assert first.logprobs is not None
    assert len(first.logprobs.tokens or []) == len(live.core.tokenizer.encode(PROMPT))
    assert chunks[-1].choices[0].finish_reason == "length"


def test_stream_is_plain_server_sent_events_that_end_with_done(live: Live) -> None:
    with live.http.stream(
        "POST", "/v1/completions", json={"prompt": PROMPT, "max_tokens": 4, "stream": True}
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        assert json.loads(line.removeprefix("data: "))["object"] == "text_completion"


def test_bad_value_of_a_stream_is_refused_with_a_status(live: Live) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        live.openai.completions.create(
            model=live.model, prompt=PROMPT, max_tokens=100_000, stream=True
        )
    assert caught.value.param == "max_tokens"


def test_failure_within_a_stream_is_told_and_the_server_goes_on(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(hidden: object) -> None:
        raise RuntimeError("injected, with a secret in it")

    stream = live.openai.completions.create(
        model=live.model, prompt=PROMPT, max_tokens=400, stream=True
    )
    next(iter(stream))
    with monkeypatch.context() as patch:
        patch.setattr(live.core.model, "logits", fail)
        with pytest.raises(openai.APIError, match="the server failed") as caught:
            list(stream)
    assert "secret" not in str(caught.value)
    answer = live.openai.completions.create(model=live.model, prompt=PROMPT, max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2


def test_failure_of_a_plain_request_is_a_server_error_without_details(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(hidden: object) -> None:
        raise RuntimeError("injected, with a secret in it")

    with monkeypatch.context() as patch:
        patch.setattr(live.core.model, "logits", fail)
        with pytest.raises(openai.InternalServerError) as caught:
            live.openai.completions.create(model=live.model, prompt=PROMPT)
    assert "secret" not in str(caught.value)
    assert live.http.get("/ready").status_code == 200
