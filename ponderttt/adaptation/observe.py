"""From what serving kept of a chunk to a `ChunkObservation`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ponderttt.adaptation.loss import logit_slices, losses_and_probabilities
from ponderttt.adaptation.observation import ChunkObservation, History
from ponderttt.models.decoder import Decoder
from ponderttt.models.kv_cache import KVCache

MAX_PROBES = 16


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """What a finished read leaves behind of one chunk.

    Args:
        token_ids: [end] int64, the sequence up to the chunk's end.
        start, end: the chunk's span.
        boundary: [end, hidden] (rows before `start` - 1 are not used).
        final: [end, hidden], hidden states after the final norm.
        cache: keys and values up to `end`.
    """

    token_ids: Tensor
    start: int
    end: int
    boundary: Tensor
    final: Tensor
    cache: KVCache


@dataclass(frozen=True, slots=True)
class Scores:
    """Losses of a chunk's tokens and the predictions' shape at the probes.

    Args:
        losses: [T] float32, nats (T-1 where the chunk begins its sequence).
        probes: [P] int64, positions in the sequence whose next-token distribution was looked at.
        entropy, top1: [P] float32.
        probabilities: [N, V] of the losses' rows, slice by slice; empty unless to be kept.
    """

    losses: Tensor
    probes: Tensor
    entropy: Tensor
    top1: Tensor
    probabilities: tuple[tuple[slice, Tensor], ...] = ()

    @property
    def loss(self) -> float:
        """Mean loss, nats per token; 0 for a lone first token."""
        return float(self.losses.mean()) if self.losses.numel() else 0.0


def score(model: Decoder, read: ChunkRead, *, keep: bool = False) -> Scores:
    """Next-token losses of the chunk as it was read, and entropies at a few positions.

    The chunk's first token is predicted from the chunk before. `keep`: the probabilities, [T, V]
    float32, come along, for whoever needs the gradient of the loss as well.
    """
    first = max(read.start - 1, 0)
    normed = read.final[first : read.end - 1]
    targets = read.token_ids[first + 1 : read.end]
    probes = _probe_positions(read.start, read.end - 1, read.final.device)
    losses = torch.empty(normed.shape[0], device=normed.device)
    entropy, top1 = (
        torch.empty_like(probes, dtype=torch.float32),
        torch.empty_like(probes, dtype=torch.float32),
    )
    kept: list[tuple[slice, Tensor]] = []
    for rows, logits in logit_slices(normed, model.head):
        losses[rows], probabilities = losses_and_probabilities(logits, targets[rows])
        here = (probes - first >= rows.start) & (probes - first < rows.stop)
        at = probabilities[probes[here] - first - rows.start]
        entropy[here] = -torch.xlogy(at, at).sum(dim=1)
        top1[here] = at.amax(dim=1)
        if keep:
            kept.append((rows, probabilities))
    return Scores(losses, probes, entropy, top1, tuple(kept))


def observe(
    model: Decoder,
    first_adaptive: int,
    read: ChunkRead,
    scores: Scores,
    text: str,
    chunk_size: int,
    history: History,
) -> ChunkObservation:
    """Everything the features need; `first_adaptive` is the index of the first adaptive block."""
    return ChunkObservation(
        token_ids=read.token_ids[read.start : read.end].cpu(),
        context_ids=read.token_ids[: read.start].cpu(),
        text=text,
        chunk_size=chunk_size,
        losses=scores.losses.cpu(),
        probe_positions=(scores.probes - read.start).cpu(),
        probe_entropy=scores.entropy.cpu(),
        probe_top1=scores.top1.cpu(),
        boundary=read.boundary[read.start : read.end].float().cpu(),
        final=read.final[read.start : read.end].float().cpu(),
        attention=_attention(model, first_adaptive, read, scores.probes).cpu(),
        vocab_size=model.config.vocab_size,
        history=history,
    )


def _probe_positions(start: int, end: int, device: torch.device) -> Tensor:
    """At most 16 positions spread over start … end-1."""
    count = min(MAX_PROBES, end - start)
    if count <= 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    return torch.linspace(start, end - 1, count, device=device).round().long()


def _attention(model: Decoder, layer: int, read: ChunkRead, probes: Tensor) -> Tensor:
    """[H, P, end] float32 attention probabilities of block `layer` at the probe positions.

    Recomputed from the boundary activations for these few rows: the attention kernels of the read
    itself never materialise them. Queries use the base weights.
    """
    c = model.config
    normed = model.blocks[layer].attention_norm(read.boundary[probes])
    rope = model.rotary.at(probes) if model.rotary is not None else None
    q, _, _ = model.project_qkv(normed, layer, None, rope)
    keys = read.cache.keys[layer, :, : read.end]
    grouped = q.view(len(probes), c.num_kv_heads, -1, c.head_dim).permute(1, 2, 0, 3)
    scores = (grouped @ keys[:, None].transpose(-1, -2)).float() * c.head_dim**-0.5
    window = c.sliding_windows[layer]
    columns, rows = torch.arange(read.end, device=q.device)[None, :], probes[:, None]
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(dim=-1).flatten(0, 1)
