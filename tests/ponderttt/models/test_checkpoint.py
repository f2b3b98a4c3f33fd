"""Loading checkpoints: files, tensors, and every way in which they can be damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Model, LlamaConfig, LlamaForCausalLM, LlamaModel

from ponderttt.errors import ModelError
from ponderttt.models.checkpoint import load_decoder, torch_device, torch_dtype
from tests.ponderttt import reference

WEIGHTS = "model.safetensors"


def spoiled(source: Path, directory: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of the checkpoint whose tensors went through `change`."""
    shutil.copytree(source, directory, dirs_exist_ok=True)
    tensors = load_file(source / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


def test_checkpoint_in_shards_gives_the_same_logits(tiny_qwen2_dir: Path, tmp_path: Path) -> None:
    with reference.hf_model(tiny_qwen2_dir) as model:
        model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = reference.code_ids(tiny_qwen2_dir, 40)
    whole = reference.our_logits(load_decoder(tiny_qwen2_dir), ids)
    assert torch.equal(reference.our_logits(load_decoder(tmp_path), ids), whole)


def test_checkpoint_in_one_file_wins_over_shards_left_behind(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    with reference.hf_model(tiny_llama_dir) as model:
        model.save_pretrained(tmp_path, max_shard_size="100KB")
    for shard in tmp_path.glob("*.safetensors"):
        stale = {name: tensor + 1.0 for name, tensor in load_file(shard).items()}
        save_file(stale, shard, metadata={"format": "pt"})
    shutil.copy(tiny_llama_dir / WEIGHTS, tmp_path)
    ids = reference.code_ids(tiny_llama_dir, 40)
    with reference.hf_model(tmp_path) as model:
        expected = reference.hf_logits(model, ids)
    torch.testing.assert_close(
        reference.our_logits(load_decoder(tmp_path), ids), expected, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("fixture", "base_class"), [("tiny_llama_dir", LlamaModel), ("tiny_gpt2_dir", GPT2Model)]
)
def test_checkpoint_of_the_base_model_without_prefix_loads(
    fixture: str, base_class: type, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(fixture)
    base_class.from_pretrained(source).save_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert not any(name.startswith(("model.", "transformer.")) for name in load_names(tmp_path))
    ids = reference.code_ids(source, 40)
    expected = reference.our_logits(load_decoder(source), ids)
    assert torch.equal(reference.our_logits(load_decoder(tmp_path), ids), expected)


def load_names(directory: Path) -> list[str]:
    return list(load_file(directory / WEIGHTS))


def test_head_of_its_own_counts_even_where_the_config_says_tied(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    def untie(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 0.5 + 0.1

    directory = spoiled(tiny_llama_dir, tmp_path, untie)
    ids = reference.code_ids(tiny_llama_dir, 40)
    with reference.hf_model(directory) as model:
        expected = reference.hf_logits(model, ids)
    torch.testing.assert_close(
        reference.our_logits(load_decoder(directory), ids), expected, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("fixture", "name"),
    [
        ("tiny_llama_dir", "model.embed_tokens.weight"),
        ("tiny_llama_dir", "model.norm.weight"),
        ("tiny_llama_dir", "model.layers.3.mlp.down_proj.weight"),
        ("tiny_mistral_dir", "lm_head.weight"),
        ("tiny_qwen2_dir", "lm_head.weight"),
        ("tiny_qwen2_dir", "model.layers.0.self_attn.k_proj.bias"),
        ("tiny_gpt2_dir", "transformer.wpe.weight"),
        ("tiny_gpt2_dir", "transformer.h.2.attn.c_attn.bias"),
        ("tiny_gpt2_dir", "transformer.ln_f.bias"),
    ],
)
def test_tensor_that_is_missing_is_named(
    fixture: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    directory = spoiled(request.getfixturevalue(fixture), tmp_path, lambda t: t.pop(name))
    with pytest.raises(ModelError, match=name.split(".", 1)[1].replace(".", r"\.")):
        load_decoder(directory)


def test_biases_that_are_all_missing_are_not_taken_for_a_model_without_biases(
    tiny_qwen2_dir: Path, tmp_path: Path
) -> None:
    def drop_biases(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".bias")]:
            del tensors[name]

    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj\.bias"):
        load_decoder(spoiled(tiny_qwen2_dir, tmp_path, drop_biases))


def test_bias_that_the_config_says_nothing_of_is_named(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    def add_bias(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.bias"] = torch.ones(128)

    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.bias"):
        load_decoder(spoiled(tiny_llama_dir, tmp_path, add_bias))


@pytest.mark.parametrize(
    ("fixture", "name"),
    [
        ("tiny_llama_dir", "model.embed_tokens.weight"),
        ("tiny_llama_dir", "model.layers.2.post_attention_layernorm.weight"),
        ("tiny_llama_dir", "model.layers.0.self_attn.q_proj.weight"),
        ("tiny_qwen2_dir", "lm_head.weight"),
        ("tiny_qwen2_dir", "model.layers.1.self_attn.v_proj.bias"),
        ("tiny_gpt2_dir", "transformer.wpe.weight"),
        ("tiny_gpt2_dir", "transformer.h.0.mlp.c_fc.weight"),
    ],
)
def test_tensor_of_another_shape_is_named_with_both_shapes(
    fixture: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    shapes: dict[str, str] = {}

    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:-1].clone()
        shapes["cut"] = str(tuple(tensors[name].shape))

    directory = spoiled(request.getfixturevalue(fixture), tmp_path, cut)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")) as caught:
        load_decoder(directory)
    assert shapes["cut"] in str(caught.value)


def test_weights_that_are_whole_numbers_are_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    def quantise(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = (tensors[name] * 100).to(torch.int8)

    with pytest.raises(ModelError, match=r"up_proj\.weight is torch\.int8"):
        load_decoder(spoiled(tiny_llama_dir, tmp_path, quantise))


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000, -1])
def test_file_that_is_cut_short_is_named(kept: int, tiny_llama_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path, dirs_exist_ok=True)
    content = (tiny_llama_dir / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_decoder(tmp_path)


def test_shard_that_is_missing_is_named(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with reference.hf_model(tiny_llama_dir) as model:
        model.save_pretrained(tmp_path, max_shard_size="100KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match=lost.name):
        load_decoder(tmp_path)


@pytest.mark.parametrize("index", ["", "{", "[]", "{}", '{"weight_map": 3}', b"\xff\xfe"])
def test_index_that_cannot_be_read_is_named(
    index: str | bytes, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_llama_dir / "config.json", tmp_path)
    content = index if isinstance(index, bytes) else index.encode()
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        load_decoder(tmp_path)


def test_checkpoint_with_pickled_weights_alone_is_refused_with_a_way_out(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_llama_dir / "config.json", tmp_path)
    torch.save(load_file(tiny_llama_dir / WEIGHTS), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="save_pretrained"):
        load_decoder(tmp_path)


def test_config_of_another_depth_names_the_block_that_is_missing(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(ModelError, match=r"layers\.4\."):
        load_decoder(tmp_path)


def test_checkpoint_in_half_precision_is_widened(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    reference.save_random(config, LlamaForCausalLM, tmp_path / "full", seed=3)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    decoder = load_decoder(tmp_path / "half")
    assert decoder.dtype is torch.float32
    ids = reference.random_ids(96, 40)
    with reference.hf_model(tmp_path / "half") as model:
        expected = reference.hf_logits(model, ids)
    torch.testing.assert_close(reference.our_logits(decoder, ids), expected, rtol=0, atol=1e-4)


def test_device_and_dtype_are_found_by_name_or_refused() -> None:
    assert torch_device("cpu") == torch.device("cpu")
    assert torch_device("auto").type in ("cpu", "cuda")
    assert torch_dtype("bfloat16") is torch.bfloat16
    for name in ("no-such-device", "cuda:97", ""):
        with pytest.raises(ModelError, match="cannot be used"):
            torch_device(name)
    with pytest.raises(ModelError, match="float64"):
        torch_dtype("float64")
