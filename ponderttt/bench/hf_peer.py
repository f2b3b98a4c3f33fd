"""Hugging Face transformers as a peer: the model as anybody would load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def load(path: Path) -> Any:
    """The checkpoint as a transformers model in float32, for inference, with its defaults."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval().requires_grad_(False)


class HuggingFace:
    """Greedy `generate`, and a prefill.

    Args:
        path: the model's directory.
    """

    def __init__(self, path: Path) -> None:
        from transformers import GenerationConfig

        self._model = load(path)
        # Not the checkpoint's, which may penalise repetition, or end the text early.
        self._model.generation_config = GenerationConfig(pad_token_id=0)

    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """`tokens` new token ids."""
        ids = torch.tensor([list(prompt)])
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
        new: list[int] = output[0, len(prompt) :].tolist()
        return new

    @torch.inference_mode()
    def first_token(self, prompt: Sequence[int]) -> int:
        """Read a prompt into a KV cache; only its last position meets the output matrix."""
        output = self._model(torch.tensor([list(prompt)]), use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())
