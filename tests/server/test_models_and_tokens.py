"""`/v1/models`, `/tokenize`, `/detokenize`, `/`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import openai
import pytest

from ponderttt.adaptation.features import FEATURE_NAMES
from ponderttt.adaptation.policy import PolicyGate, PolicyMetadata, PolicyNetwork, save_policy
from tests.server.live import PROMPT, Live, live_server
from tests.server.test_chat import MESSAGES


def test_models_lists_the_served_one(live: Live) -> None:
    (model,) = live.openai.models.list().data
    assert model.id == live.model
    assert model.object == "model"
    assert (model.model_extra or {})["max_model_len"] == 512
    assert live.openai.models.retrieve(live.model) == model
    with pytest.raises(openai.NotFoundError, match=live.model):
        live.openai.models.retrieve("gpt-4")


def test_model_tells_how_its_server_learns(live: Live, tiny_llama_dir: Path) -> None:
    (model,) = live.http.get("/v1/models").json()["data"]
    assert model["ttt"]["rule"] == asdict(live.core.writer.rule) | {"step_scales": [1.0] * 4}
    assert {name: value for name, value in model["ttt"].items() if name != "rule"} == {
        "gate": "threshold", "action": "UPDATE_1", "budget": 2.0, "cost_model": "nominal",
        "chunk_size": 256, "adapt_on": "prompt", "when": "inline", "read": "auto",
        # What comes of the calibration with this model.
        "lora": {
            "rank": 8, "alpha": 16.0, "layers": 1, "seed": 0,
            "targets": ["gate_proj", "up_proj", "down_proj"],
        },
        "policy": None, "measure_costs": False, "engine": "torch", "dtype": "float32",
    }  # fmt: skip
    # Where files lie is nobody's business.
    assert str(tiny_llama_dir.parent) not in json.dumps(model)


def test_model_tells_what_a_server_was_started_with(tiny_llama_dir: Path, tmp_path: Path) -> None:
    network = PolicyNetwork((8,))
    count = len(FEATURE_NAMES)
    metadata = PolicyMetadata(
        tiny_llama_dir.name, 64, "nominal", (2.0,), (0.0,) * count, (1.0,) * count, (8,)
    )
    save_policy(tmp_path / "policy", network, metadata)
    options: dict[str, Any] = {
        "action": "UPDATE_2", "budget": 3.0, "cost_model": "measured", "chunk_size": 64,
        "adapt_on": "both", "when": "background", "read": "session", "dtype": "bfloat16",
    }  # fmt: skip
    shape = {"rank": 2, "alpha": 4.0, "adaptive_layers": 2, "targets": "q_proj,v_proj"}
    with live_server(
        tiny_llama_dir, learning_rate=0.5, policy=tmp_path / "policy", **options, **shape
    ) as server:
        ttt = server.http.get(f"/v1/models/{server.model}").json()["ttt"]
    assert {name: ttt[name] for name in options} == options
    assert ttt["lora"] == {
        "rank": 2, "alpha": 4.0, "layers": 2, "targets": ["q_proj", "v_proj"], "seed": 0,
    }  # fmt: skip
    assert ttt["rule"]["learning_rate"] == 0.5
    assert (ttt["gate"], ttt["policy"]) == ("policy", PolicyGate(network, metadata).digest)


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
