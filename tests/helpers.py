"""Tiny checkpoints and a tiny tokenizer, made on the spot and seeded."""

from __future__ import annotations

import argparse
import inspect
import json.decoder
import textwrap
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CHAT_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FIM_SPECIALS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 512
CONTEXT = 512
SPREAD = 0.2


def source_text() -> str:
    """Real Python code that is on every machine: a few modules of the standard library."""
    return "\n".join(inspect.getsource(module) for module in (json.decoder, textwrap, argparse))


def tiny_tokenizer(specials: tuple[str, ...] = CHAT_SPECIALS) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 entries with a ChatML template; `<|endoftext|>` ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(source_text().splitlines(keepends=True), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Fill every parameter, so that a bias or a norm that a loader forgets changes the logits.

    Weights and biases have a standard deviation of 0.2 (logits are then far from flat), norm
    weights lie around 1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * SPREAD
            is_norm = parameter.dim() == 1 and not name.endswith("bias")
            parameter.copy_(noise + 1.0 if is_norm else noise)
    model.tie_weights()


def save_tiny(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path, seed: int
) -> Path:
    """Write a seeded random checkpoint in the Hugging Face layout."""
    randomise(model, seed)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _shape(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }


def make_tiny_llama(directory: Path) -> Path:
    """Llama, output matrix tied to the embedding."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(**_shape(tokenizer), tie_word_embeddings=True)
    return save_tiny(LlamaForCausalLM(config), tokenizer, directory, seed=1)


def make_tiny_qwen2(directory: Path) -> Path:
    """Qwen2: attention biases, output matrix of its own, fill-in-the-middle tokens."""
    tokenizer = tiny_tokenizer(CHAT_SPECIALS + FIM_SPECIALS)
    config = Qwen2Config(**_shape(tokenizer), tie_word_embeddings=False)
    return save_tiny(Qwen2ForCausalLM(config), tokenizer, directory, seed=2)


def make_tiny_mistral(directory: Path) -> Path:
    """Mistral with a sliding window of 32 tokens, short enough to matter in a test."""
    tokenizer = tiny_tokenizer()
    config = MistralConfig(**_shape(tokenizer), sliding_window=32, tie_word_embeddings=False)
    return save_tiny(MistralForCausalLM(config), tokenizer, directory, seed=3)


def make_tiny_gpt2(directory: Path) -> Path:
    """GPT-2: learned positions, layer norms with biases, fused and transposed projections."""
    tokenizer = tiny_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=64,
        n_layer=4,
        n_head=4,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return save_tiny(GPT2LMHeadModel(config), tokenizer, directory, seed=4)
