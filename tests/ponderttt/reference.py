"""The outside reference (transformers, peft) and our decoder, driven the same way."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ponderttt.fast_weights.adapter import BatchedAdapter
from ponderttt.fast_weights.layout import AdapterLayout
from ponderttt.models.decoder import Decoder
from ponderttt.models.kv_cache import KVCache
from ponderttt.models.tokenizer import Tokenizer
from tests import helpers

#: Fixtures of the tiny checkpoints, one per family.
FAMILIES = ("tiny_llama_dir", "tiny_qwen2_dir", "tiny_mistral_dir", "tiny_gpt2_dir")
#: Logits against transformers and PEFT, float32.
LOGITS_TOLERANCE = 1e-4
#: Our own decoder in float32 against itself in other pieces: only the order of sums differs.
#: Observed up to 2.3e-5 with logits up to 8; in float64 (test_attention) nothing is left of it.
SPLIT_TOLERANCE = 5e-5


@contextmanager
def hf_model(path: Path) -> Iterator[Any]:
    """The checkpoint as transformers runs it, in float32; its memory is free afterwards."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True
    ).eval()
    try:
        yield model
    finally:
        del model
        gc.collect()


def save_random(config: PretrainedConfig, model_class: type, directory: Path, seed: int) -> Path:
    """A checkpoint without a tokenizer, every parameter random."""
    model: PreTrainedModel = model_class(config)
    helpers.randomise(model, seed)
    model.save_pretrained(directory)
    return directory


def hf_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """[T, V] by one whole forward."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


@contextmanager
def _peft_behind_transformers() -> Iterator[None]:
    """Bear with a deprecated name that PEFT 0.21 still uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def with_peft(model: Any, config: LoraConfig) -> Any:
    """A transformers model with a new adapter."""
    with _peft_behind_transformers():
        return get_peft_model(model, config)


def with_peft_from(model: Any, adapter: Path, *, trainable: bool = False) -> Any:
    """A transformers model with an adapter directory that PEFT itself loads."""
    with _peft_behind_transformers():
        return PeftModel.from_pretrained(model, adapter, is_trainable=trainable).eval()


def peft_logits(path: Path, adapter: Path, ids: Sequence[int]) -> Tensor:
    """[T, V] of the checkpoint with an adapter directory."""
    with hf_model(path) as model:
        return hf_logits(with_peft_from(model, adapter), ids)


@torch.inference_mode()
def forward(
    decoder: Decoder,
    pieces: Sequence[tuple[KVCache, int, Sequence[int]]],
    adapter: BatchedAdapter | None = None,
    *,
    decodes: bool = False,
) -> list[Tensor]:
    """One flat step over (cache, start, tokens); the logits [T, V] of each piece."""
    lengths = [len(ids) for _, _, ids in pieces]
    segments = [(cache, start, len(ids)) for cache, start, ids in pieces]
    batch = decoder.batch(segments, decodes=decodes)
    x = decoder.embed(torch.tensor([token for _, _, ids in pieces for token in ids]), batch)
    x = decoder.run(x, 0, decoder.config.num_layers, batch, adapter)
    for cache_, start, ids in pieces:
        cache_.length = start + len(ids)
    return list(decoder.logits(decoder.normed(x)).split(lengths))


def our_logits(
    decoder: Decoder,
    ids: Sequence[int],
    layout: AdapterLayout | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """[T, V] by one whole forward, with the fast weights [P] where they are given."""
    adapter = None
    if layout is not None and weights is not None:
        views = layout.views(weights[None])
        adapter = BatchedAdapter(views, [0], [len(ids)], layout.config.scale)
    return forward(decoder, [(decoder.new_cache(len(ids)), 0, ids)], adapter)[0]


@cache
def _source_ids(tokenizer_dir: Path) -> list[int]:
    return Tokenizer.from_dir(tokenizer_dir).encode(helpers.source_text())


def code_ids(tokenizer_dir: Path, count: int, offset: int = 0) -> list[int]:
    """Tokens of real Python code."""
    ids = _source_ids(tokenizer_dir)[offset : offset + count]
    if len(ids) < count:
        raise ValueError(f"the source text has no {count} tokens from {offset}")
    return ids


def random_ids(vocabulary: int, count: int, seed: int = 0) -> list[int]:
    """Tokens drawn evenly, for checkpoints without a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(vocabulary, (count,), generator=generator).tolist()
    return ids


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Seeded standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_weights(layout: AdapterLayout, seed: int, spread: float = 0.05) -> Tensor:
    """[P] fast weights with B away from zero."""
    generator = torch.Generator().manual_seed(seed)
    fresh = layout.fresh(torch.device("cpu"), torch.float32)
    return fresh + torch.randn(layout.size, generator=generator) * spread
