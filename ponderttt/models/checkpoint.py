"""Hugging Face checkpoints (safetensors) → `Decoder`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ponderttt.errors import ModelError
from ponderttt.models.config import ModelConfig
from ponderttt.models.decoder import Block, Decoder
from ponderttt.models.layers import FusedLinear, LayerNorm, Part, RMSNorm
from ponderttt.models.product import FrozenMatrix
from ponderttt.models.stages import Norm

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class _Weights:
    """Tensors of a checkpoint by name, from one file or several, moved where they are wanted."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._path, self._device, self._dtype = path, device, dtype
        self._files = {}
        for file in _files(path):
            try:
                handle = safe_open(file, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{file}: the weights cannot be read: {error}") from error
            self._files.update(dict.fromkeys(handle.keys(), handle))
        # Base-model checkpoints leave out the prefix that the full model has.
        prefixes = ("model.", "transformer.")
        self._prefix = next(
            (p for p in prefixes if any(name.startswith(p) for name in self._files)), ""
        )

    def __contains__(self, name: str) -> bool:
        return name in self._files or self._prefix + name in self._files

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        full = name if name in self._files else self._prefix + name
        if full not in self._files:
            raise ModelError(f"{self._path}: the checkpoint lacks the tensor {name!r}")
        tensor = self._files[full].get_tensor(full)
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{self._path}: {full} has shape {tuple(tensor.shape)}, config.json says {shape}"
            )
        if not tensor.is_floating_point():
            raise ModelError(
                f"{self._path}: {full} is {tensor.dtype}; quantised weights are not supported"
            )
        # A view of the file would keep all of it mapped, beside the fused copies.
        return tensor.to(device=self._device, dtype=self._dtype, copy=True)


@dataclass(frozen=True, slots=True)
class _Layouts:
    """How the matrices are kept: see `load_decoder`."""

    packed: bool
    native: bool

    def matrix(self, weight: Tensor) -> FrozenMatrix:
        return FrozenMatrix(weight, packed=self.packed, native=self.native)


def _files(path: Path) -> list[Path]:
    # The order in which transformers looks.
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    index = path / _INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
            return [path / name for name in sorted(names)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: cannot be read: {error!r}") from error
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise ModelError(
            f"{path}: no *.safetensors file; convert the checkpoint with transformers' "
            "save_pretrained (pickled weights are not loaded)"
        )
    return found


def torch_device(name: str) -> torch.device:
    """A device that is there, by torch's name; `auto` is the GPU if there is one.

    Raises:
        ModelError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {name!r} cannot be used: {error}; try 'cpu'") from error
    return device


def torch_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16`; ModelError for anything else."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ModelError(f"dtype {name!r} is not one of {', '.join(known)}")
    return known[name]


# Weights made in inference mode could not take part in a write.
@torch.inference_mode(False)
def load_decoder(
    path: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    packed: bool = True,
    native: bool = True,
    compiled: bool = False,
) -> Decoder:
    """Load a checkpoint directory in Hugging Face format.

    Args:
        path: holds `config.json` and safetensors.
        device, dtype: where and as what the weights are kept.
        packed: keep the matrices in faster layouts as well, where there are such; takes twice the
            memory.
        native: use kernels in C (`ponderttt.models.native`), where this machine has them.
        compiled: as after `Decoder.compile`.
    Raises:
        ModelError: unsupported architecture; missing, misshapen, unexpected or quantised tensors;
            what is to be compiled can't be.
    """
    config = ModelConfig.from_pretrained(path)
    weights = _Weights(path, torch.device(device), dtype)
    build = _gpt2_block if config.model_type == "gpt2" else _llama_block
    layouts = _Layouts(packed, native)
    blocks = tuple(build(config, weights, layer, layouts) for layer in range(config.num_layers))
    vocabulary = (config.vocab_size, config.hidden_size)
    if config.model_type == "gpt2":
        embedding = weights("wte.weight", vocabulary)
        positions = weights("wpe.weight", (config.max_positions, config.hidden_size))
        final_norm: Norm = _layer_norm(config, weights, "ln_f")
    else:
        embedding, positions = weights("embed_tokens.weight", vocabulary), None
        final_norm = _rms_norm(config, weights, "norm")
    # A matrix of its own counts even where the config says "tied", as in transformers.
    own_head = not config.tied_head or "lm_head.weight" in weights
    head = weights("lm_head.weight", vocabulary) if own_head else embedding
    matrix = layouts.matrix(head)
    decoder = Decoder(config, embedding, positions, blocks, final_norm, matrix, native=native)
    if compiled:
        decoder.compile()
    return decoder


def _layer_norm(config: ModelConfig, weights: _Weights, name: str) -> LayerNorm:
    shape = (config.hidden_size,)
    return LayerNorm(
        weights(f"{name}.weight", shape), weights(f"{name}.bias", shape), config.norm_eps
    )


def _rms_norm(config: ModelConfig, weights: _Weights, name: str) -> RMSNorm:
    return RMSNorm(weights(f"{name}.weight", (config.hidden_size,)), config.norm_eps)


def _fused(
    weights: _Weights,
    block: str,
    parts: tuple[Part, ...],
    *,
    bias: bool,
    transposed: bool,
    layouts: _Layouts,
) -> FusedLinear:
    """Fuse projections of one input, stored [out, in], or [in, out] where `transposed`.

    Part names are relative to the block (`mlp.up_proj`).
    """
    matrices, biases = [], []
    for part in parts:
        name, shape = f"{block}.{part.name}", (part.in_features, part.out_features)
        part_weight = weights(f"{name}.weight", shape if transposed else shape[::-1])
        matrices.append(part_weight.t() if transposed else part_weight)
        if bias:
            biases.append(weights(f"{name}.bias", (part.out_features,)))
        elif f"{name}.bias" in weights:
            raise ModelError(f"the checkpoint has {name}.bias, which config.json says nothing of")
    matrix = layouts.matrix(torch.cat(matrices).contiguous())
    return FusedLinear(parts, matrix, torch.cat(biases) if bias else None)


def _llama_block(config: ModelConfig, weights: _Weights, layer: int, layouts: _Layouts) -> Block:
    c, at = config, f"layers.{layer}"
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def fused(bias: bool, *parts: tuple[str, int, int]) -> FusedLinear:
        named = tuple(Part(*part) for part in parts)
        return _fused(weights, at, named, bias=bias, transposed=False, layouts=layouts)

    return Block(
        attention_norm=_rms_norm(c, weights, f"{at}.input_layernorm"),
        qkv=fused(
            c.qkv_bias,
            ("self_attn.q_proj", c.hidden_size, q_size),
            ("self_attn.k_proj", c.hidden_size, kv_size),
            ("self_attn.v_proj", c.hidden_size, kv_size),
        ),
        output=fused(c.output_bias, ("self_attn.o_proj", q_size, c.hidden_size)),
        mlp_norm=_rms_norm(c, weights, f"{at}.post_attention_layernorm"),
        up=fused(
            c.mlp_bias,
            ("mlp.gate_proj", c.hidden_size, c.intermediate_size),
            ("mlp.up_proj", c.hidden_size, c.intermediate_size),
        ),
        down=fused(c.mlp_bias, ("mlp.down_proj", c.intermediate_size, c.hidden_size)),
    )


def _gpt2_block(config: ModelConfig, weights: _Weights, layer: int, layouts: _Layouts) -> Block:
    c, at = config, f"h.{layer}"

    def fused(bias: bool, name: str, in_features: int, out_features: int) -> FusedLinear:
        part = Part(name, in_features, out_features)
        # GPT-2's Conv1D stores [in, out].
        return _fused(weights, at, (part,), bias=bias, transposed=True, layouts=layouts)

    return Block(
        attention_norm=_layer_norm(c, weights, f"{at}.ln_1"),
        qkv=fused(c.qkv_bias, "attn.c_attn", c.hidden_size, 3 * c.hidden_size),
        output=fused(c.output_bias, "attn.c_proj", c.hidden_size, c.hidden_size),
        mlp_norm=_layer_norm(c, weights, f"{at}.ln_2"),
        up=fused(c.mlp_bias, "mlp.c_fc", c.hidden_size, c.intermediate_size),
        down=fused(c.mlp_bias, "mlp.c_proj", c.intermediate_size, c.hidden_size),
    )
