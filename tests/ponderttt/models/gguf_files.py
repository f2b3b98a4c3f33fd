"""A tiny GGUF file made on the spot, and digests of what the `gguf` package reads out of one.

    python -m tests.ponderttt.models.gguf_files FILE.gguf LAYER

prints the digests of one layer; those of the two embedded models stand in test_convert.py.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def huggingface_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    if name in OUTER:
        return OUTER[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{NAMES[rest]}"


def dequantised(path: Path) -> dict[str, Any]:
    """A function for each tensor of a GGUF file, by its Hugging Face name: calling it gives the
    float32 values, in the row order of Hugging Face."""
    reader = gguf.GGUFReader(path)
    architecture = reader.get_field("general.architecture").contents()
    heads = reader.get_field(f"{architecture}.attention.head_count").contents()
    kv_heads = reader.get_field(f"{architecture}.attention.head_count_kv").contents()

    def values(tensor: Any) -> Any:
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        # llama.cpp interleaves the two halves of each rotary head, for Llama only.
        if architecture == "llama" and ".attn_q." in tensor.name:
            return halves_apart(array, heads)
        if architecture == "llama" and ".attn_k." in tensor.name:
            return halves_apart(array, kv_heads)
        return array

    return {
        huggingface_name(tensor.name): lambda tensor=tensor: values(tensor)
        for tensor in reader.tensors
        if tensor.name in OUTER or tensor.name.startswith("blk.")
    }


def halves_apart(weight: Any, heads: int) -> Any:
    """Rows of each head from pairs (0, 32, 1, 33, …) back to halves (0, 1, …, 32, 33, …)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def digest(array: Any) -> str:
    """SHA-256 of an array's float32 values, row by row."""
    return hashlib.sha256(np.ascontiguousarray(array, dtype=np.float32).tobytes()).hexdigest()


def layer_digest(tensors: dict[str, str]) -> str:
    """One digest for a layer, from the digests of its tensors by name."""
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()


def write_tiny_gguf(checkpoint: Path, path: Path) -> None:
    """Write a Qwen2 checkpoint as GGUF, its matrices in Q4_1 as in smollm2-135m's file."""
    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, arch="qwen2")
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _write_tokenizer(writer, tokenizer, config["eos_token_id"])
    names = {huggingface_name(name): name for name in _gguf_names(config["num_hidden_layers"])}
    for name, array in sorted(load_file(checkpoint / "model.safetensors").items()):
        if array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(names[name], gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(names[name], array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_names(layers: int) -> list[str]:
    return [*OUTER, *(f"blk.{layer}.{rest}" for layer in range(layers) for rest in NAMES)]


def _write_tokenizer(writer: Any, tokenizer: dict[str, Any], end: int) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types(
        [control if token_id in special else normal for token_id in range(len(tokens))]
    )
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_chat_template("{{ messages[0]['content'] }}")


if __name__ == "__main__":
    prefix = f"model.layers.{sys.argv[2]}."
    tensors = dequantised(Path(sys.argv[1]))
    print(layer_digest({n: digest(tensors[n]()) for n in tensors if n.startswith(prefix)}))
