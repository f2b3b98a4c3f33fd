"""The usual way to do test-time training: PEFT, one adapter, one request at a time.

Chunk by chunk: forward with the KV cache so far, next-token loss of the chunk, backward through it,
one Adam step; then greedy generation with the adapted weights.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ponderttt.adaptation.chunking import chunk_spans
from ponderttt.adaptation.rules import UpdateRule
from ponderttt.bench.hf_peer import load
from ponderttt.fast_weights.layout import AdapterLayout
from ponderttt.fast_weights.peft_format import export_adapter
from ponderttt.models.decoder import Decoder

#: What works best for LoRA on every projection of every block of `smollm2-135m`.
FULL_DEPTH_RULE = UpdateRule(learning_rate=1e-3, beta1=0.9, beta2=0.99)
FULL_DEPTH_RANK, FULL_DEPTH_ALPHA = 8, 16

Learns = Literal["prompt", "generated"]


@dataclass(slots=True)
class PeftOutcome:
    """What came of one request.

    Args:
        tokens: new token ids.
        losses: (tokens, mean loss in nats before the step) of each chunk that was learned.
    """

    tokens: list[int] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)


@contextmanager
def _old_names_allowed() -> Iterator[None]:
    """PEFT asks transformers for attributes that are about to be renamed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class PeftLoop:
    """A PEFT model and its optimiser, made fresh for every request.

    Args:
        model: a PEFT model whose adapter can be trained.
        rule: gives Adam's settings, the clipping and the least tokens; its other fields are ours.
    """

    def __init__(self, model: Any, rule: UpdateRule) -> None:
        self.model, self._rule = model.eval(), rule
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._fresh = [p.detach().clone() for p in self._trained]
        self._optimiser = self._new_optimiser()

    @classmethod
    def full_depth(cls, path: Path) -> PeftLoop:
        """LoRA of rank 8 on all linear projections of all blocks."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=FULL_DEPTH_RANK,
            lora_alpha=FULL_DEPTH_ALPHA,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            with _old_names_allowed():
                return cls(get_peft_model(load(path), config), FULL_DEPTH_RULE)

    @classmethod
    def where_ours_sits(
        cls, path: Path, decoder: Decoder, layout: AdapterLayout, rule: UpdateRule
    ) -> PeftLoop:
        """LoRA in the blocks and projections of `layout`, beginning with the same values."""
        from peft import PeftModel

        fresh = layout.fresh(decoder.device, torch.float32)
        with tempfile.TemporaryDirectory() as directory, _old_names_allowed():
            export_adapter(layout, fresh, Path(directory), str(path))
            model = PeftModel.from_pretrained(load(path), directory, is_trainable=True)
        return cls(model, rule)

    def run(
        self, prompt: Sequence[int], tokens: int, chunk_size: int, learns: Learns
    ) -> PeftOutcome:
        """Learn the prompt's chunks, or those of the generated text, by one step each.

        Args:
            prompt: token ids.
            tokens: to be generated, greedily.
            chunk_size: tokens per chunk.
            learns: which text.
        """
        from transformers import DynamicCache

        self._reset()
        text, cache, outcome = list(prompt), DynamicCache(), PeftOutcome()
        if learns == "prompt":
            for start, end in chunk_spans(0, len(prompt), chunk_size):
                self._learn(text, cache, start, end, outcome)
        start = len(prompt)
        for _ in range(tokens):
            text.append(self._next(text, cache))
            if learns == "generated" and len(text) - start == chunk_size:
                self._learn(text, cache, start, len(text), outcome)
                start = len(text)
        if learns == "generated":
            # The last token was never read.
            self._learn(text, cache, start, len(text) - 1, outcome)
        outcome.tokens = text[len(prompt) :]
        return outcome

    def _learn(
        self, text: list[int], cache: Any, start: int, end: int, outcome: PeftOutcome
    ) -> None:
        """One step on tokens start … end-1; leaves all but the last of them in the cache."""
        if end - start < self._rule.min_tokens:
            return
        first = max(start - 1, 0)  # predicts the chunk's first token
        if (too_many := cache.get_seq_length() - first) > 0:
            cache.crop(-too_many)
        logits = self._forward(text[first : end - 1], cache)
        loss = F.cross_entropy(logits, torch.tensor(text[first + 1 : end]))
        self._optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, self._rule.max_grad_norm)
        self._optimiser.step()
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        outcome.losses.append((end - first - 1, float(loss.detach())))

    @torch.no_grad()
    def _next(self, text: list[int], cache: Any) -> int:
        """Read what the cache does not hold yet and draw the next token."""
        return int(self._forward(text[cache.get_seq_length() :], cache, keep=1)[-1].argmax())

    def _forward(self, ids: list[int], cache: Any, keep: int = 0) -> Tensor:
        """Logits [T, V] of `ids` after the cache's text; of the last `keep` of them unless 0."""
        output = self.model(
            input_ids=torch.tensor([ids]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: Tensor = output.logits[0]
        return logits

    def _reset(self) -> None:
        with torch.no_grad():
            for parameter, fresh in zip(self._trained, self._fresh, strict=True):
                parameter.copy_(fresh)
        self._optimiser = self._new_optimiser()

    def _new_optimiser(self) -> torch.optim.Adam:
        rule = self._rule
        return torch.optim.Adam(
            self._trained, lr=rule.learning_rate, betas=(rule.beta1, rule.beta2), eps=rule.eps
        )
