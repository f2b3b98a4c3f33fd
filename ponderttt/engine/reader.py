"""Reads: prefill and decode, without autograd, for sequences of different owners at once."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

import torch
from torch import Tensor

from ponderttt.engine.sequence import Sequence
from ponderttt.fast_weights.bank import BASE_SLOT, AdapterBank, StepTag
from ponderttt.models.decoder import Decoder
from ponderttt.models.kv_cache import KVCache
from ponderttt.models.transfer import tensor_on


class Readable(Protocol):
    """A text on its way through the model; see `Sequence` for the fields."""

    tokens: list[int]
    cache: KVCache
    boundary: Tensor | None
    final: Tensor | None
    computed: int

    @property
    def replays(self) -> bool:
        """Whether the trunk's part of the next positions is there already."""


class Reader:
    """Runs the model over pieces of sequences and keeps what chunks will need.

    Args:
        model: frozen.
        bank: the fast weights; every sequence reads its session's slot.

    `first_adaptive` is the index of the first adaptive block.
    """

    def __init__(self, model: Decoder, bank: AdapterBank) -> None:
        self._model = model
        self._bank = bank
        self.first_adaptive = bank.layout.first_layer

    def new_buffer(self, capacity: int) -> Tensor:
        """A boundary or final buffer of one sequence, [capacity, hidden]."""
        model = self._model
        with torch.inference_mode(False):
            return torch.empty(
                (capacity, model.config.hidden_size), device=model.device, dtype=model.dtype
            )

    def new_buffers(self, capacity: int) -> tuple[Tensor, Tensor]:
        """Boundary and final buffers of one sequence, each [capacity, hidden]."""
        return self.new_buffer(capacity), self.new_buffer(capacity)

    def tags(self, sequences: Seq[Sequence]) -> tuple[StepTag, ...]:
        """Owner and version that each sequence reads in a step that starts now."""
        return tuple(
            StepTag(BASE_SLOT, None, 0)
            if s.base or s.group.session is None
            else self._bank.tag(s.group.session.slot, s.group.session.owner)
            for s in sequences
        )

    @torch.inference_mode()
    def read(
        self,
        pieces: Seq[tuple[Readable, int]],
        tags: Seq[StepTag],
        *,
        decodes: bool = False,
    ) -> tuple[Tensor, ...]:
        """Advance each text by its number of tokens, all in one flat batch.

        Args:
            pieces: texts and counts; either all of them replay their trunk, or none does.
            tags: whose weights each may see.
            decodes: every piece is the last token that was drawn. The last token of a prompt is
                none, however few tokens are read: it is read alike with and without what is known.
        Returns:
            Hidden states after the final norm, [count, hidden] per piece.
        """
        model = self._model
        lengths = [count for _, count in pieces]
        batch = model.batch([(s.cache, s.computed, n) for s, n in pieces], decodes=decodes)
        if pieces[0][0].replays:
            rows = [_rows(s.boundary, s.computed, count) for s, count in pieces]
            x = torch.cat(rows)
        else:
            x = model.embed(self._token_ids(pieces), batch)
            x = model.run(x, 0, self.first_adaptive, batch)
            self._keep_boundary(pieces, x, lengths)
        adapter = self._bank.read(tags, lengths)
        x = model.run(x, self.first_adaptive, model.config.num_layers, batch, adapter)
        normed = model.normed(x).split(lengths)
        for (sequence, count), final in zip(pieces, normed, strict=True):
            if sequence.final is not None:
                _rows(sequence.final, sequence.computed, count).copy_(final)
            sequence.computed += count
            sequence.cache.length = sequence.computed
        return normed

    def take_back(self, sequences: Seq[Sequence]) -> None:
        """Forget the last position that each sequence read."""
        for sequence in sequences:
            sequence.computed -= 1
            sequence.cache.length = sequence.computed

    def _token_ids(self, pieces: Seq[tuple[Readable, int]]) -> Tensor:
        flat = [
            token
            for sequence, count in pieces
            for token in sequence.tokens[sequence.computed : sequence.computed + count]
        ]
        return tensor_on(self._model.device, flat)

    def _keep_boundary(
        self, pieces: Seq[tuple[Readable, int]], x: Tensor, lengths: list[int]
    ) -> None:
        for (sequence, count), rows in zip(pieces, x.split(lengths), strict=True):
            if sequence.boundary is not None:
                _rows(sequence.boundary, sequence.computed, count).copy_(rows)


def _rows(buffer: Tensor | None, start: int, count: int) -> Tensor:
    if buffer is None:
        raise RuntimeError("a sequence that replays has no boundary activations")
    return buffer[start : start + count]
