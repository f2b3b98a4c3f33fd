"""Reading config.json: what is supported, and how everything else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from ponderttt.errors import ModelError
from ponderttt.models.config import ModelConfig

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GPT2_SIZES: dict[str, Any] = {"vocab_size": 96, "n_positions": 256, "n_embd": 64, "n_layer": 3}


def write_config(directory: Path, config: PretrainedConfig, **changes: Any) -> Path:
    """`config.json` as transformers writes it, some values replaced afterwards."""
    (directory / "config.json").write_text(json.dumps({**config.to_dict(), **changes}))
    return directory


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **values}


def test_config_of_llama_has_its_sizes(tmp_path: Path) -> None:
    config = ModelConfig.from_pretrained(
        write_config(tmp_path, LlamaConfig(**SIZES, head_dim=24, rms_norm_eps=3e-6))
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 24)
    assert (config.norm, config.norm_eps, config.activation) == ("rms", 3e-6, "silu")
    assert (config.hidden_size, config.intermediate_size, config.max_positions) == (64, 96, 256)
    assert config.inv_freq is not None
    assert config.inv_freq.shape == (12,)
    assert config.sliding_windows == (None,) * 4


def test_config_of_gpt2_has_its_sizes(tmp_path: Path) -> None:
    config = ModelConfig.from_pretrained(write_config(tmp_path, GPT2Config(**GPT2_SIZES, n_head=4)))
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 4, 16)
    assert (config.norm, config.activation, config.gated_mlp) == ("layer", "gelu_tanh", False)
    assert config.intermediate_size == 256
    assert config.inv_freq is None


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (MistralConfig(**SIZES, sliding_window=16), (16,) * 4),
        (MistralConfig(**SIZES, sliding_window=None), (None,) * 4),
        (
            Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=2),
            (None, None, 16, 16),
        ),
        (Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=16), (None,) * 4),
        # Llama in transformers pays no heed to a window.
        (LlamaConfig(**SIZES, sliding_window=16), (None,) * 4),
    ],
)
def test_sliding_windows_are_those_of_transformers(
    config: PretrainedConfig, windows: tuple[int | None, ...], tmp_path: Path
) -> None:
    assert ModelConfig.from_pretrained(write_config(tmp_path, config)).sliding_windows == windows


def test_rope_in_the_old_spelling_is_read(tmp_path: Path) -> None:
    old = write_config(tmp_path, LlamaConfig(**SIZES)) / "config.json"
    values = json.loads(old.read_text())
    del values["rope_parameters"]
    scaling = {"type": "linear", "factor": 4.0}
    old.write_text(json.dumps({**values, "rope_theta": 5e5, "rope_scaling": scaling}))
    config = ModelConfig.from_pretrained(tmp_path)
    plain = 1.0 / (5e5 ** (torch.arange(0, 16, 2) / 16))
    torch.testing.assert_close(config.inv_freq, plain / 4.0)


@pytest.mark.parametrize(
    ("config", "changes", "named"),
    [
        (LlamaConfig(**SIZES), {"model_type": "gemma2"}, "gemma2"),
        (LlamaConfig(**SIZES), {"model_type": "no-such-model"}, "no-such-model"),
        (LlamaConfig(**SIZES), {"rope_parameters": rope("dynamic", factor=2.0)}, "'dynamic'"),
        (LlamaConfig(**SIZES), {"rope_parameters": rope("no-such-rope")}, "'no-such-rope'"),
        (
            LlamaConfig(**SIZES),
            {"rope_parameters": rope("default", partial_rotary_factor=0.5)},
            "partial_rotary_factor",
        ),
        (LlamaConfig(**SIZES), {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LlamaConfig(**SIZES), {"rope_parameters": rope("linear")}, "factor"),
        (LlamaConfig(**SIZES), {"rope_parameters": rope("linear", factor="x")}, "rope_parameters"),
        (LlamaConfig(**SIZES), {"rope_parameters": rope("linear", factor=0.0)}, "rope_parameters"),
        (LlamaConfig(**SIZES), {"hidden_act": "relu2"}, "relu2"),
        (LlamaConfig(**SIZES), {"hidden_size": "64"}, "hidden_size"),
        (LlamaConfig(**SIZES), {"num_attention_heads": 0}, "config.json"),
        (LlamaConfig(**SIZES), {"num_attention_heads": 5}, "hidden size"),
        (LlamaConfig(**SIZES), {"num_key_value_heads": 3}, "num_key_value_heads"),
        (LlamaConfig(**SIZES), {"num_hidden_layers": 0}, "num_hidden_layers"),
        (LlamaConfig(**SIZES), {"max_position_embeddings": -1}, "max_position_embeddings"),
        (
            LlamaConfig(**SIZES),
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantization_config",
        ),
        (Qwen2Config(**SIZES), {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        (
            GPT2Config(**GPT2_SIZES, n_head=4),
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx",
        ),
        (GPT2Config(**GPT2_SIZES, n_head=4), {"scale_attn_weights": False}, "scale_attn_weights"),
        (GPT2Config(**GPT2_SIZES, n_head=4), {"add_cross_attention": True}, "add_cross_attention"),
        (GPT2Config(**GPT2_SIZES, n_head=4), {"n_head": 5}, "n_head"),
        (GPT2Config(**GPT2_SIZES, n_head=4), {"n_layer": 0}, "n_layer"),
        (GPT2Config(**GPT2_SIZES, n_head=4), {"activation_function": "tanh"}, "tanh"),
    ],
)
def test_config_that_is_not_supported_is_refused_by_name(
    config: PretrainedConfig, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=named):
        ModelConfig.from_pretrained(write_config(tmp_path, config, **changes))


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_config_that_cannot_be_read_is_a_model_error(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelConfig.from_pretrained(tmp_path)


def test_config_with_code_of_its_own_is_refused_without_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions: list[str] = []

    def ask(question: str = "") -> str:
        questions.append(question)
        return "n"

    monkeypatch.setattr("builtins.input", ask)
    changes = {"model_type": "my-own", "auto_map": {"AutoConfig": "configuration_my_own.MyConfig"}}
    with pytest.raises(ModelError, match="custom code"):
        ModelConfig.from_pretrained(write_config(tmp_path, LlamaConfig(**SIZES), **changes))
    assert questions == []
