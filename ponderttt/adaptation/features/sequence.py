"""Length, position and repetition of the chunk's tokens, against the text before it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ponderttt.adaptation.features.group import FeatureGroup
from ponderttt.adaptation.observation import ChunkObservation

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SequenceView:
    """The chunk's T tokens, known by where they occurred before.

    Args:
        start: tokens before the chunk.
        total: start + T.
        previous: [T], position of each token's latest earlier occurrence; -1: none.
        counts: [T], occurrences of each token in context and chunk.
        copied: for each token of the chunk whose predecessor occurred before, whether the same
            token came after it then, at the latest of those times.
        characters: length of the text.
        chunk_size: tokens of a full chunk.
        vocab_size: V.
    """

    start: int
    total: int
    previous: Ints
    counts: Ints
    copied: NDArray[np.bool_]
    characters: int
    chunk_size: int
    vocab_size: int


def occurrences(symbols: Ints) -> tuple[Ints, Ints]:
    """Latest earlier position of each symbol (-1: none), and how often each occurs in all.

    Args:
        symbols: [N] int64.
    Returns:
        Two arrays [N] int64.
    """
    size = symbols.size
    order = np.argsort(symbols, kind="stable")
    ordered = symbols[order]
    opens = np.ones(size, dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=opens[1:])
    previous = np.full(size, -1, dtype=np.int64)
    follows = ~opens
    previous[order[follows]] = order[:-1][follows[1:]]
    group = np.cumsum(opens) - 1
    counts = np.empty(size, dtype=np.int64)
    counts[order] = np.bincount(group)[group]
    return previous, counts


def _view(obs: ChunkObservation) -> SequenceView:
    tokens = np.concatenate(
        (obs.context_ids.numpy(force=True), obs.token_ids.numpy(force=True)), dtype=np.int64
    )
    start = obs.start
    previous, counts = occurrences(tokens)
    former = previous[max(0, start - 1) : -1]
    followed = tokens[tokens.size - former.size :]
    known = former >= 0
    return SequenceView(
        start,
        tokens.size,
        previous[start:],
        counts[start:],
        tokens[former[known] + 1] == followed[known],
        len(obs.text),
        obs.chunk_size,
        obs.vocab_size,
    )


def position(view: SequenceView) -> float:
    """log(1 + start / chunk size): full chunks before this one, on a log scale."""
    return math.log1p(view.start / view.chunk_size)


def length(view: SequenceView) -> float:
    """log((1 + characters) / chunk size): a short chunk at a text's end, or densely coded text.

    T / chunk size alone is 1 for all but the last chunk of a text.
    """
    return math.log((1 + view.characters) / view.chunk_size)


def type_token_ratio(view: SequenceView) -> float:
    """Distinct tokens of the chunk / T, in (0, 1]."""
    return float(np.mean(view.previous < view.start))


def copy_accuracy(view: SequenceView) -> float:
    """Share of tokens that repeat what followed their predecessor's latest earlier occurrence.

    In [0, 1], over the tokens whose predecessor occurred before (in the context or earlier in the
    chunk), 0 where none did: how far copying alone predicts the chunk. The share of tokens or
    bigrams that occurred before nearly repeats the position or the mean loss.
    """
    return float(view.copied.mean()) if view.copied.size else 0.0


def rarity(view: SequenceView) -> float:
    """-mean over the chunk of log(occurrences in context and chunk / (start + T)) / log V."""
    shares = np.log(view.counts / view.total)
    return -float(shares.mean()) / math.log(max(view.vocab_size, 2))


def recency(view: SequenceView) -> float:
    """Mean of log(distance to the latest earlier occurrence) / log(start + T), in [0, 1].

    Over the tokens of the chunk that occurred before; 1 where none did.
    """
    seen = view.previous >= 0
    if not seen.any():
        return 1.0
    here = np.arange(view.start, view.total)
    return float(np.log(here[seen] - view.previous[seen]).mean()) / math.log(view.total)


SEQUENCE = FeatureGroup(
    name="sequence",
    prepare=_view,
    features=(position, length, type_token_ratio, copy_accuracy, rarity, recency),
)
