"""What drawing tokens needs to remember of one sequence."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.errors import InvalidRequestError
from ponderttt.models.transfer import moved, tensor_on

# Below this a division by the temperature overflows float32; vLLM draws the same line.
_GREEDY_BELOW = 1e-5


class _SeenTokens:
    """Distinct tokens of one sequence and how often it generated each; adding one costs O(1)."""

    __slots__ = ("_counts", "_ids", "_places", "_size")

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        distinct = list(dict.fromkeys(prompt_ids))
        self._places = {token: place for place, token in enumerate(distinct)}
        self._size = len(distinct)
        self._ids = np.zeros(max(64, 2 * self._size), dtype=np.int64)
        self._ids[: self._size] = distinct
        self._counts = np.zeros(len(self._ids))

    def add(self, token: int) -> None:
        """Count a generated token."""
        place = self._places.setdefault(token, self._size)
        if place == self._size:
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token
            self._size += 1
        self._counts[place] += 1

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Token ids (int64) and how often each was generated (float64; 0: in the prompt only)."""
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        return moved(torch.from_numpy(ids), device), moved(torch.from_numpy(counts), device)


@dataclass(slots=True)
class SamplerState:
    """Parameters, tokens and random numbers of one sequence.

    Args:
        params: how to draw.
        prompt_ids: tokens of the prompt; the repetition penalty looks at them.
        output_ids: tokens generated so far; extend it by `observe` or by appending to it.
        seed: overrides `params.seed`; with neither, one is drawn. Holds the seed in use afterwards.
        child: index among the n sequences of one prompt. Siblings share a seed and differ in this;
            the pair alone decides the random numbers.
    """

    params: SamplingParams
    prompt_ids: Sequence[int] = ()
    output_ids: list[int] = field(default_factory=list)
    seed: int | None = None
    child: int = 0
    generator: torch.Generator = field(init=False, repr=False)
    _seen: _SeenTokens | None = field(init=False, default=None, repr=False)
    _counted: int = field(init=False, default=0, repr=False)

    def __post_init__(self) -> None:
        if self.seed is None:
            self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed
        # Hashed, since the CPU generator reads only the low 32 bits of a seed, and so that
        # sibling 1 of seed 5 has nothing to do with sibling 0 of seed 6.
        key = hashlib.blake2b(f"{self.seed}/{self.child}".encode(), digest_size=4).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(key))

    def observe(self, token: int) -> None:
        """Append a generated token to the output."""
        self.output_ids.append(token)

    @property
    def greedy(self) -> bool:
        """The most likely token is taken; nothing is drawn."""
        return self.params.temperature < _GREEDY_BELOW

    @property
    def changes_logits(self) -> bool:
        """A bias or a penalty acts on the logits."""
        return bool(self.params.logit_bias) or self._penalises

    @property
    def _penalises(self) -> bool:
        params = self.params
        return (
            params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
        )

    def adjust(self, row: Tensor) -> Tensor:
        """Logits [V] after bias and penalties; `row` itself where there are none, else a copy.

        Costs O(distinct tokens), besides the copy; each generated token is counted once.
        Source: Keskar et al., arXiv:1909.05858, section 4.1, for the repetition penalty; the
        OpenAI API reference for the other two.
        """
        if not self.changes_logits:
            return row
        row = row.clone()
        params = self.params
        if params.logit_bias:
            ids = tensor_on(row.device, list(params.logit_bias))
            row[ids] += tensor_on(row.device, list(params.logit_bias.values()))
        if self._penalises:
            ids, counts = self._count_new_tokens().tensors(row.device)
            # In float64 and clamped, since a repetition penalty may be as small as a float gets.
            values = row[ids].double()
            factor = params.repetition_penalty
            values = torch.where(values > 0, values / factor, values * factor)
            values -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
            limits = torch.finfo(row.dtype)
            row[ids] = values.clamp_(limits.min, limits.max).to(row.dtype)
        return row

    def _count_new_tokens(self) -> _SeenTokens:
        if self._seen is None:
            # Presence and frequency count generated tokens only.
            repetition = self.params.repetition_penalty != 1.0
            self._seen = _SeenTokens(self.prompt_ids if repetition else ())
        while self._counted < len(self.output_ids):
            self._seen.add(self.output_ids[self._counted])
            self._counted += 1
        return self._seen


def check_logit_bias(params: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidRequestError if `logit_bias` names a token outside [0, vocab_size)."""
    for token in params.logit_bias:
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(
                f"logit_bias.{token}", f"{token} lies outside the vocabulary, [0, {vocab_size - 1}]"
            )
