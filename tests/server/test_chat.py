"""`/v1/chat/completions`, through the official client."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from httpx import ASGITransport

from ponderttt.engine.async_engine import AsyncEngine
from ponderttt.engine.config import EngineConfig
from ponderttt.engine.loading import load_core
from server.app import create_app
from server.settings import Settings
from tests.server.live import Live

MESSAGES: Any = [
    {"role": "system", "content": "You write Python."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "Reverse "}, {"type": "text", "text": "a list"}],
    },
]
GREEDY: dict[str, Any] = {"max_completion_tokens": 12, "temperature": 0}


def test_chat_answers_what_its_template_writes(live: Live) -> None:
    written = (
        "<|im_start|>system\nYou write Python.<|im_end|>\n"
        "<|im_start|>user\nReverse a list<|im_end|>\n<|im_start|>assistant\n"
    )
    completion = live.openai.completions.create(
        model=live.model, prompt=written, max_tokens=12, temperature=0
    )
    answer = live.openai.chat.completions.create(model=live.model, messages=MESSAGES, **GREEDY)
    message = answer.choices[0].message
    assert message.role == "assistant"
    assert message.content == completion.choices[0].text
    assert answer.usage is not None
    assert completion.usage is not None
    assert answer.usage.prompt_tokens == completion.usage.prompt_tokens
    assert (answer.model_extra or {})["ttt"]["gate"] == "threshold"


def test_developer_is_read_as_system(live: Live) -> None:
    renamed: Any = [{**MESSAGES[0], "role": "developer"}, MESSAGES[1]]
    one = live.openai.chat.completions.create(model=live.model, messages=MESSAGES, **GREEDY)
    other = live.openai.chat.completions.create(model=live.model, messages=renamed, **GREEDY)
    assert one.choices[0].message.content == other.choices[0].message.content


def test_chat_logprobs_spell_each_token_in_bytes(live: Live) -> None:
    answer = live.openai.chat.completions.create(
        model=live.model, messages=MESSAGES, **GREEDY, logprobs=True, top_logprobs=4
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert len(content) == 12
    spelt = b"".join(bytes(token.bytes or []) for token in content)
    assert spelt.decode(errors="replace") == choice.message.content
    for token in content:
        assert len(token.top_logprobs) == 4
        assert token.logprob == token.top_logprobs[0].logprob
        assert token.token == token.top_logprobs[0].token


def test_chat_logprobs_without_a_number_list_no_alternatives(live: Live) -> None:
    answer = live.openai.chat.completions.create(
        model=live.model, messages=MESSAGES, **GREEDY, logprobs=True
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.top_logprobs for token in logprobs.content] == [[]] * 12


def test_chat_without_limit_fills_the_context(live: Live) -> None:
    answer = live.openai.chat.completions.create(
        model=live.model, messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == live.core.max_model_len


def test_chat_choices_differ(live: Live) -> None:
    answer = live.openai.chat.completions.create(
        model=live.model, messages=MESSAGES, n=3, seed=5, max_tokens=10
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3


def test_chat_stop(live: Live) -> None:
    whole = live.openai.chat.completions.create(model=live.model, messages=MESSAGES, **GREEDY)
    text = whole.choices[0].message.content or ""
    stop = text[4:7]
    answer = live.openai.chat.completions.create(
        model=live.model, messages=MESSAGES, **GREEDY, stop=stop
    )
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_chat_that_exceeds_the_context_is_too_long(live: Live) -> None:
    long: Any = [{"role": "user", "content": "x " * 4000}]
    with pytest.raises(openai.APIStatusError, match="512") as caught:
        live.openai.chat.completions.create(model=live.model, messages=long)
    assert caught.value.status_code == 413
    assert caught.value.param == "messages"


async def test_chat_for_a_model_without_template_is_refused(
    tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "plain"
    shutil.copytree(tiny_gpt2_dir, directory)
    (directory / "chat_template.jinja").unlink()
    core = load_core(str(directory), config=EngineConfig(measure_costs=False))
    app = create_app(AsyncEngine(core), Settings())
    async with httpx.AsyncClient(
        transport=ASGITransport(app), base_url="http://localhost"
    ) as client:
        answer = await client.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"
    assert "chat template" in answer.json()["error"]["message"]
