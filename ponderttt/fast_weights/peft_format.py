"""Fast weights as a PEFT adapter: a directory that `peft` and vLLM load as it is."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ponderttt.errors import AdapterFormatError
from ponderttt.fast_weights.layout import AdapterLayout, Entry

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

#: No sensible alpha is near it; beyond lies what float32 cannot hold.
MAX_ALPHA = 1e6

# What PEFT can do beyond plain LoRA, and the only values of it that mean plain LoRA. The kinds of
# initialisation that are missing here (pissa, olora, …) change the base weights on loading.
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, True, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}


def _key(layout: AdapterLayout, entry: Entry, matrix: str) -> str:
    blocks = "transformer.h" if layout.model_type == "gpt2" else "model.layers"
    return f"base_model.model.{blocks}.{entry.layer}.{entry.module}.lora_{matrix}.weight"


def adapter_config(layout: AdapterLayout, base_model: str) -> bytes:
    """`adapter_config.json` of every adapter with this layout.

    Args:
        layout: of the fast weights.
        base_model: name or path that it states.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=layout.config.rank,
        lora_alpha=layout.config.alpha,
        target_modules=sorted({entry.module for entry in layout.entries}),
        layers_to_transform=sorted({entry.layer for entry in layout.entries}),
        layers_pattern="h" if layout.model_type == "gpt2" else "layers",
        fan_in_fan_out=layout.model_type == "gpt2",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    with TemporaryDirectory(prefix="ponderttt-") as directory:
        config.save_pretrained(directory)
        return (Path(directory) / CONFIG_FILE).read_bytes()


def adapter_weights(layout: AdapterLayout, weights: Tensor) -> bytes:
    """`adapter_model.safetensors` of [P] fast weights."""
    matrices = layout.views(weights.detach().cpu().unsqueeze(0))
    tensors = {}
    for entry in layout.entries:
        a, b = matrices[entry.layer, entry.module]
        tensors[_key(layout, entry, "A")] = a[0].contiguous()
        tensors[_key(layout, entry, "B")] = b[0].contiguous()
    written: bytes = save(tensors, metadata={"format": "pt"})
    return written


def export_adapter(
    layout: AdapterLayout, weights: Tensor, directory: Path, base_model: str
) -> None:
    """Write [P] fast weights as a PEFT adapter directory.

    Args:
        layout: of the vector.
        weights: [P].
        directory: made if missing.
        base_model: name or path that the adapter's config states.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_bytes(adapter_config(layout, base_model))
    (directory / WEIGHTS_FILE).write_bytes(adapter_weights(layout, weights))


def import_adapter(layout: AdapterLayout, directory: Path, fresh: Tensor) -> Tensor:
    """Read a PEFT adapter directory into a flat vector [P].

    Args:
        layout: of the vector.
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.
        fresh: as `parse_adapter`.
    Raises:
        AdapterFormatError: a file can't be read; and as `parse_adapter`.
    """
    found = {}
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            found[name] = (directory / name).read_bytes()
        except OSError as error:
            raise AdapterFormatError(f"{directory / name}: cannot be read: {error}") from error
    return parse_adapter(layout, found[CONFIG_FILE], found[WEIGHTS_FILE], fresh, str(directory))


def parse_adapter(
    layout: AdapterLayout, config_json: bytes, weights: bytes, fresh: Tensor, directory: str
) -> Tensor:
    """The contents of a PEFT adapter's two files as a flat vector [P].

    A lower rank is filled up with fresh rows of A and zeros in B: they change nothing yet, but can
    learn (were both zero, no gradient would reach them). Another alpha is folded into B, and
    projections that the adapter leaves out stay fresh.

    Args:
        layout: of the vector.
        config_json, weights: `adapter_config.json` and `adapter_model.safetensors`.
        fresh: [P], values for what the adapter leaves out (B zero).
        directory: how messages name the adapter.
    Raises:
        AdapterFormatError: not plain LoRA, too high a rank, projections outside the layout,
            misshapen, missing or non-finite tensors.
    """
    config = _read_config(f"{directory}/{CONFIG_FILE}", config_json)
    scale = _check_config(layout, config)
    rank = config["r"]
    where = f"{directory}/{WEIGHTS_FILE}"
    try:
        loaded = load(weights)
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterFormatError(f"{where}: cannot be read: {error}") from error
    if not loaded:
        raise AdapterFormatError(f"{where}: holds no tensor")
    # Half precision is widened before alpha is folded in, or the product would be rounded twice.
    tensors = {key: tensor.float() for key, tensor in loaded.items()}
    flat = fresh.detach().cpu().clone().unsqueeze(0)
    matrices = layout.views(flat)
    for entry in layout.entries:
        keys = {matrix: _key(layout, entry, matrix) for matrix in "AB"}
        found = {matrix: tensors.pop(key) for matrix, key in keys.items() if key in tensors}
        if not found:
            continue
        if len(found) == 1:
            raise AdapterFormatError(f"{directory}: only one of {keys['A']} and its B is there")
        _check_tensor(directory, keys["A"], found["A"], (rank, entry.in_features))
        _check_tensor(directory, keys["B"], found["B"], (entry.out_features, rank))
        a, b = matrices[entry.layer, entry.module]
        a[0, :rank].copy_(found["A"])
        b[0].zero_()
        b[0, :, :rank].copy_(found["B"] * (scale / layout.config.scale))
        _check_finite(directory, keys["B"], b[0])
    if tensors:
        raise AdapterFormatError(
            f"{directory}: {min(tensors)} and {len(tensors) - 1} more lie outside the "
            f"adaptive projections (blocks {layout.first_layer} to {layout.last_layer - 1}, "
            f"{layout.config.targets}); serve with more adaptive layers or other targets"
        )
    return flat[0].to(device=fresh.device, dtype=fresh.dtype)


def _read_config(path: str, text: bytes) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise AdapterFormatError(f"{path}: not a JSON object")
    return config


def _check_config(layout: AdapterLayout, config: dict[str, Any]) -> float:
    """The adapter's alpha / rank."""
    for field, allowed in _PLAIN_LORA.items():
        if config.get(field, allowed[0]) not in allowed:
            raise AdapterFormatError(
                f"{CONFIG_FILE}: {field} = {config[field]!r} is not plain LoRA; "
                f"only {allowed[0]!r} is supported"
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= layout.config.rank:
        raise AdapterFormatError(
            f"{CONFIG_FILE}: r = {rank!r}; this server holds ranks 1 to {layout.config.rank} "
            "(set a higher --rank)"
        )
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= MAX_ALPHA:
        raise AdapterFormatError(
            f"{CONFIG_FILE}: lora_alpha = {alpha!r} must be above 0 and at most {MAX_ALPHA:g}"
        )
    return alpha / rank


def _check_tensor(directory: str, key: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    if tuple(tensor.shape) != shape:
        raise AdapterFormatError(f"{directory}: {key} has shape {tuple(tensor.shape)}, not {shape}")
    _check_finite(directory, key, tensor)


def _check_finite(directory: str, key: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise AdapterFormatError(f"{directory}: {key} has values that are not finite")
