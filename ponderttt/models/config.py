"""The shape of a decoder, read from a Hugging Face config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ponderttt.errors import ModelError

_LLAMA_LIKE = ("llama", "qwen2", "mistral")
_STATIC_ROPE = ("linear", "llama3", "yarn")
_ATTENTION_TYPES = ("full_attention", "sliding_attention")
_LLAMA_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything the decoder needs to know; sizes in elements.

    `model_type` is Hugging Face's; `sliding_windows` has one entry per block, None where the block
    attends to everything; `inv_freq` [head_dim / 2] is None where positions are learned; with
    `tied_head` the output matrix is the embedding unless the checkpoint holds another.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm_eps: float
    norm: Literal["rms", "layer"]
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"]
    gated_mlp: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied_head: bool
    sliding_windows: tuple[int | None, ...]
    inv_freq: Tensor | None
    rope_scale: float

    @classmethod
    def from_pretrained(cls, path: Path) -> ModelConfig:
        """Read `config.json` in `path`.

        Raises:
            ModelError: the architecture, or one of its switches, is not supported, or a value
                makes no sense.
        """
        from transformers import AutoConfig

        try:
            # Said expressly, or transformers would ask at the terminal whether to run the code.
            hf = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # its validators raise errors of many kinds
            raise ModelError(f"{path}: config.json cannot be read: {error}") from error
        if getattr(hf, "quantization_config", None):
            raise ModelError(
                f"{path}: config.json: quantization_config is not supported; "
                "take the checkpoint in float32, bfloat16 or float16"
            )
        if hf.model_type == "gpt2":
            return cls._from_gpt2(hf)
        if hf.model_type in _LLAMA_LIKE:
            return cls._from_llama(hf)
        raise ModelError(
            f"{path}: model type {hf.model_type!r} is not supported; supported are "
            f"gpt2, {', '.join(_LLAMA_LIKE)}"
        )

    @classmethod
    def _from_gpt2(cls, hf: Any) -> ModelConfig:
        for switch in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if getattr(hf, switch, False):
                raise ModelError(f"config.json: {switch} = true is not supported")
        if not hf.scale_attn_weights:
            raise ModelError("config.json: scale_attn_weights = false is not supported")
        _check_sizes(hf, ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions"))
        _check_multiple(hf, "n_embd", "n_head")
        return cls(
            model_type="gpt2",
            vocab_size=hf.vocab_size,
            hidden_size=hf.n_embd,
            num_layers=hf.n_layer,
            num_heads=hf.n_head,
            num_kv_heads=hf.n_head,
            head_dim=hf.n_embd // hf.n_head,
            intermediate_size=hf.n_inner or 4 * hf.n_embd,
            max_positions=hf.n_positions,
            norm_eps=hf.layer_norm_epsilon,
            norm="layer",
            activation=_activation(hf.activation_function),
            gated_mlp=False,
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
            tied_head=hf.tie_word_embeddings,
            sliding_windows=(None,) * hf.n_layer,
            inv_freq=None,
            rope_scale=1.0,
        )

    @classmethod
    def _from_llama(cls, hf: Any) -> ModelConfig:
        _check_sizes(hf, _LLAMA_SIZES)
        _check_multiple(hf, "num_attention_heads", "num_key_value_heads")
        attention_bias = hf.model_type == "llama" and hf.attention_bias
        head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        inv_freq, rope_scale = _rope(hf, head_dim)
        return cls(
            model_type=hf.model_type,
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            num_layers=hf.num_hidden_layers,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads,
            head_dim=head_dim,
            intermediate_size=hf.intermediate_size,
            max_positions=hf.max_position_embeddings,
            norm_eps=hf.rms_norm_eps,
            norm="rms",
            activation=_activation(hf.hidden_act),
            gated_mlp=True,
            qkv_bias=attention_bias or hf.model_type == "qwen2",
            output_bias=attention_bias,
            mlp_bias=hf.model_type == "llama" and hf.mlp_bias,
            tied_head=hf.tie_word_embeddings,
            sliding_windows=_sliding_windows(hf),
            inv_freq=inv_freq,
            rope_scale=rope_scale,
        )


def _check_sizes(hf: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(hf, name) < 1:
            raise ModelError(f"config.json: {name} = {getattr(hf, name)} must be 1 or more")


def _check_multiple(hf: Any, whole: str, part: str) -> None:
    if getattr(hf, whole) % getattr(hf, part):
        raise ModelError(
            f"config.json: {whole} = {getattr(hf, whole)} is no multiple of "
            f"{part} = {getattr(hf, part)}"
        )


def _activation(name: str) -> Literal["silu", "gelu_tanh", "gelu", "relu"]:
    known: dict[str, Literal["silu", "gelu_tanh", "gelu", "relu"]] = {
        "silu": "silu",
        "swish": "silu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu": "gelu",
        "relu": "relu",
    }
    if name not in known:
        raise ModelError(f"config.json: activation {name!r} is not one of {', '.join(known)}")
    return known[name]


def _sliding_windows(hf: Any) -> tuple[int | None, ...]:
    # Llama has no windows, whatever a config left over from elsewhere says.
    window = None if hf.model_type == "llama" else hf.sliding_window
    types = getattr(hf, "layer_types", None) if hf.model_type == "qwen2" else None
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * hf.num_hidden_layers
    for kind in types:
        if kind not in _ATTENTION_TYPES:
            raise ModelError(
                f"config.json: layer_types has {kind!r}; supported are "
                f"{', '.join(_ATTENTION_TYPES)}"
            )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _rope(hf: Any, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] and the factor on cos and sin."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = hf.rope_parameters
    kind = parameters.get("rope_type", "default")
    if parameters.get("partial_rotary_factor") not in (None, 1.0):
        raise ModelError("config.json: partial_rotary_factor is not supported")
    if kind != "default" and kind not in _STATIC_ROPE:
        raise ModelError(
            f"config.json: rope_type {kind!r} is not supported; supported are default, "
            f"{', '.join(_STATIC_ROPE)}"
        )
    try:
        if kind == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
            inv_freq, scale = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
        else:
            inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"))
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"config.json: rope_parameters cannot be used: {error!r}") from error
    if not (inv_freq.isfinite().all() and math.isfinite(scale)):
        raise ModelError(f"config.json: rope_parameters = {parameters} give infinite frequencies")
    return inv_freq, float(scale)
