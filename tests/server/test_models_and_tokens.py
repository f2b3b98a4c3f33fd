"""`/v1/models`, `/tokenize`, `/detokenize`, `/`."""

from __future__ import annotations

import openai
import pytest

from tests.server.live import PROMPT, Live
from tests.server.test_chat import MESSAGES


def test_models_lists_the_served_one(live: Live) -> None:
    (model,) = live.openai.models.list().data
    assert model.id == live.model
    assert model.object == "model"
    assert (model.model_extra or {})["max_model_len"] == 512
    assert live.openai.models.retrieve(live.model) == model
    with pytest.raises(openai.NotFoundError, match=live.model):
        live.openai.models.retrieve("gpt-4")


def test_tokenize_and_back(live: Live) -> None:
    text = "naïve = '€𝄞'\n"
    answer = live.http.post("/tokenize", json={"prompt": text, "model": live.model}).json()
    assert answer == {
        "count": len(answer["tokens"]),
        "max_model_len": 512,
        "tokens": live.core.tokenizer.encode(text),
    }
    back = live.http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": text}


def test_tokenize_gives_token_texts_when_asked(live: Live) -> None:
    body = {"prompt": PROMPT, "return_token_strs": True}
    answer = live.http.post("/tokenize", json=body).json()
    assert "".join(answer["token_strs"]) == PROMPT


def test_tokenize_of_a_chat_counts_what_the_chat_is_charged(live: Live) -> None:
    counted = live.http.post("/tokenize", json={"messages": MESSAGES}).json()["count"]
    bare = live.http.post(
        "/tokenize", json={"messages": MESSAGES, "add_generation_prompt": False}
    ).json()["count"]
    answer = live.openai.chat.completions.create(model=live.model, messages=MESSAGES, max_tokens=1)
    assert answer.usage is not None
    assert counted == answer.usage.prompt_tokens > bare


def test_root_leads_to_the_documentation(live: Live) -> None:
    answer = live.http.get("/", follow_redirects=True)
    assert answer.url.path == "/docs"
    assert "/openapi.json" in answer.text
