"""What was seen of one chunk when it was read: the raw material of the features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class History:
    """What a session remembers of the chunks before this one.

    Args:
        loss_ema: moving average of chunk losses, nats per token (0 before the first chunk).
        cost_ema: moving average of nominal costs, × forward (1 before the first chunk).
        budget: highest mean cost asked for, × forward (12 where there is none).
        credit: budget not spent so far, × forward.
        ahead: chunks of the same request that are certain to follow this one.
    """

    loss_ema: float = 0.0
    cost_ema: float = 1.0
    budget: float = 12.0
    credit: float = 0.0
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class ChunkObservation:
    """One chunk of T tokens at positions start … start+T-1 of its sequence, read without autograd.

    S is start + T; P is the number of probe positions (a spread of at most 16 of the T).

    Args:
        token_ids: [T] int64.
        context_ids: [start] int64, the tokens of the sequence before the chunk.
        text: the chunk's text.
        chunk_size: tokens of a full chunk; T is smaller at the end of a text.
        losses: [T] float32, next-token cross-entropy in nats of each token of the chunk (T-1 for
            a chunk that begins its sequence: nothing predicts the first token).
        probe_positions: [P] int64, indices into the chunk, ascending.
        probe_entropy: [P] float32, entropy in nats of the next-token distribution there.
        probe_top1: [P] float32, the highest probability there.
        boundary: [T, hidden] float32, hidden states at the trunk's top.
        final: [T, hidden] float32, hidden states after the final norm.
        attention: [H, P, S] float32, attention probabilities of the first adaptive block at the
            probe positions (causal: zero beyond each probe).
        vocab_size: V.
        history: what the session remembers.
    """

    token_ids: Tensor
    context_ids: Tensor
    text: str
    chunk_size: int
    losses: Tensor
    probe_positions: Tensor
    probe_entropy: Tensor
    probe_top1: Tensor
    boundary: Tensor
    final: Tensor
    attention: Tensor
    vocab_size: int
    history: History

    @property
    def start(self) -> int:
        """Position of the chunk's first token in its sequence."""
        return int(self.context_ids.shape[0])
