"""Attention of a flat batch: rows of several sequences, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ponderttt.models.kv_cache import KVCache
from ponderttt.models.native.decode_attention import DecodeAttention
from ponderttt.models.transfer import moved

# Rows of a long piece of text that share a mask.
_PIECE = 256


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one sequence in a flat batch.

    Args:
        cache: the sequence's keys and values.
        start: position of the first row in the sequence.
        length: number of rows T.
    """

    cache: KVCache
    start: int
    length: int


class FlatBatch:
    """Rows of several sequences laid end to end, and how each attends to its own past.

    Every linear layer then sees one matrix of N rows, whatever the sequences' lengths; only
    attention looks at the segments. With `replay`, new keys and values are used but not stored:
    the cache before a segment's start is a constant, and gradients flow through the rest.

    Args:
        segments: in the order of the rows.
        device: of the batch's tensors.
        dtype: of the attention masks.
        replay: see above.
        native: use the kernel in C for steps that decode, where there is one.
        decodes: the rows are tokens that were drawn, one per sequence. A text's last row is none:
            it is read as the rows before it. No effect where a sequence has several, or on replay.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        device: torch.device,
        dtype: torch.dtype,
        *,
        replay: bool = False,
        native: bool = False,
        decodes: bool = False,
    ) -> None:
        self.segments = tuple(segments)
        self.replay = replay
        self.lengths = [segment.length for segment in segments]
        self._masks: dict[tuple[int, int, int | None], Tensor | None] = {}
        self.decodes = decodes and not replay and all(length == 1 for length in self.lengths)
        self._steps: dict[int | None, list[_DecodeViews]] = {}
        self._native = native
        self._kernels: dict[int | None, DecodeAttention] = {}
        self._device, self._dtype = device, dtype
        positions = [torch.arange(s.start, s.start + s.length) for s in segments]
        self.positions = moved(torch.cat(positions), device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Causal attention of every row over its own sequence.

        Args:
            layer: index of the block.
            q: [N, heads, head_dim], rotated.
            k, v: [N, kv_heads, head_dim], keys rotated.
            window: positions a row may look back, itself included; None: all.
        Returns:
            [N, heads * head_dim].
        """
        if self.decodes:
            return self._decode(layer, q, k, v, window)
        outputs = []
        rows = zip(
            self.segments,
            q.split(self.lengths),
            k.split(self.lengths),
            v.split(self.lengths),
            strict=True,
        )
        for index, (segment, q_rows, k_rows, v_rows) in enumerate(rows):
            keys, values = self._visible(layer, segment, k_rows, v_rows)
            if segment.start == 0 and segment.length > 1 and window is None:
                outputs.append(_causal(q_rows, keys, values))
            else:
                outputs.append(self._masked(index, q_rows, keys, values, window))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def decode_kernel(self, heads: int, window: int | None) -> DecodeAttention | None:
        """The kernel in C for a step of one row per sequence; None where there is none.

        Args:
            heads: of the queries.
            window: as of `attend`.
        """
        if not (self.decodes and self._native):
            return None
        if not DecodeAttention.fits(self.segments[0].cache, heads):
            return None
        if window not in self._kernels:
            places = [(s.cache, s.start) for s in self.segments]
            self._kernels[window] = DecodeAttention(places, window)
        return self._kernels[window]

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """As `attend`, for one row per sequence: no mask, and the fewest operations."""
        learns = torch.is_grad_enabled() and any(rows.requires_grad for rows in (q, k, v))
        kernel = None if learns else self.decode_kernel(q.shape[1], window)
        if kernel is not None:
            return kernel(layer, q, k, v)
        kv_heads, size = k.shape[1:]
        spread = self._device.type == "cpu" and heads_to_spread(kv_heads, torch.get_num_threads())
        group = q.shape[1] // kv_heads if spread else None
        if window not in self._steps:
            self._steps[window] = [_DecodeViews.of(s, window, group) for s in self.segments]
        views = self._steps[window]
        torch._foreach_copy_([view.new_keys[layer] for view in views], list(k.unbind()))
        torch._foreach_copy_([view.new_values[layer] for view in views], list(v.unbind()))
        # The heads of a group become query rows, so that keys need not be copied; or each becomes
        # a head of its own that looks at the same keys.
        shape = (kv_heads, group, 1) if group else (1, kv_heads, -1)
        grouped = q.reshape(len(views), *shape, size).unbind()
        outputs = [
            F.scaled_dot_product_attention(rows, view.keys[layer], view.values[layer])
            for rows, view in zip(grouped, views, strict=True)
        ]
        return torch.cat(outputs).view(len(views), -1)

    def _masked(self, index: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """In pieces of rows: what lies beyond a piece's last row is not even looked at."""
        start, length = self.segments[index].start, self.segments[index].length
        if length <= _PIECE:
            return _grouped(q, k, v, self._mask(start, length, window))
        pieces = []
        for begin in range(0, length, _PIECE):
            end = min(begin + _PIECE, length)
            seen = start + end
            mask = self._mask(start + begin, end - begin, window)
            pieces.append(_grouped(q[begin:end], k[:, :seen], v[:, :seen], mask))
        return torch.cat(pieces)

    def _visible(self, layer: int, segment: Segment, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not self.replay:
            return segment.cache.write(layer, segment.start, k, v)
        past_keys = segment.cache.keys[layer, :, : segment.start]
        past_values = segment.cache.values[layer, :, : segment.start]
        return (
            torch.cat((past_keys, k.transpose(0, 1)), dim=1),
            torch.cat((past_values, v.transpose(0, 1)), dim=1),
        )

    def _mask(self, start: int, length: int, window: int | None) -> Tensor | None:
        """[T, S] float mask, made once per step and shared by the blocks; None: all visible."""
        key = (start, length, window)
        if key not in self._masks:
            total = start + length
            if length == 1 and (window is None or total <= window):
                self._masks[key] = None
            else:
                visible = causal_visible(start, length, window, self._device)
                mask = torch.zeros(visible.shape, device=self._device, dtype=self._dtype)
                self._masks[key] = mask.masked_fill_(~visible, float("-inf"))
        return self._masks[key]


@dataclass(frozen=True, slots=True)
class _DecodeViews:
    """What one sequence's next row writes and sees, block by block; made once per step.

    Shapes: `new_keys`, `new_values` [kv_heads, D]; `keys`, `values` [1, kv_heads, S, D], or
    [kv_heads, group, S, D] where a group's size is given.
    """

    new_keys: tuple[Tensor, ...]
    new_values: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def of(cls, segment: Segment, window: int | None, group: int | None) -> _DecodeViews:
        cache, at = segment.cache, segment.start
        cache.check(at + 1)
        first = 0 if window is None else max(at + 1 - window, 0)
        seen = [cached[:, :, first : at + 1] for cached in (cache.keys, cache.values)]
        if group is None:
            keys, values = (every[:, None] for every in seen)
        else:
            keys, values = (e[:, :, None].expand(-1, -1, group, -1, -1) for e in seen)
        return cls(
            cache.keys[:, :, at].unbind(),
            cache.values[:, :, at].unbind(),
            keys.unbind(),
            values.unbind(),
        )


def heads_to_spread(kv_heads: int, threads: int) -> bool:
    """Whether a step's attention is faster with every head by itself than by groups.

    The kernel gives whole heads to threads. Groups read their keys once, which is worth a tenth,
    but 3 of them on 2 threads take as long as 4.
    """
    return -(-kv_heads // threads) * threads >= 1.25 * kv_heads


def causal_visible(start: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """[length, start + length] bool: which positions each of the last `length` rows may see."""
    rows = torch.arange(start, start + length, device=device)[:, None]
    columns = torch.arange(start + length, device=device)[None, :]
    visible = columns <= rows
    return visible if window is None else visible & (columns > rows - window)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `_grouped`, of a text from its first token on: the kernel leaves out what is masked."""
    if q.device.type != "cpu" and k.shape[0] < q.shape[1]:
        # Elsewhere not every kernel takes groups, and what steps in keeps [heads, T, T].
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[0], dim=0) for each in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], is_causal=True, enable_gqa=True
    )
    return out[0].transpose(0, 1).flatten(1)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention without copying keys: the heads of a group become query rows.

    Shapes: q [T, heads, D]; k, v [kv_heads, S, D]; mask [T, S] or None → [T, heads * D].
    """
    length, heads, size = q.shape
    kv_heads = k.shape[0]
    group = heads // kv_heads
    folded = q.view(length, kv_heads, group, size).permute(1, 2, 0, 3)
    folded = folded.reshape(1, kv_heads, group * length, size)
    if mask is not None and group > 1:
        mask = mask.repeat(group, 1)
    out = F.scaled_dot_product_attention(folded, k[None], v[None], attn_mask=mask)
    out = out.view(kv_heads, group, length, size).permute(2, 0, 1, 3)
    return out.reshape(length, heads * size)
