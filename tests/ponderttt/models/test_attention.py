"""Flat batches: however rows are laid out over steps, every sequence sees the same past.

Most of it in float64, where rounding hides nothing; the logits themselves come as float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ponderttt.models import attention
from ponderttt.models.attention import causal_visible, heads_to_spread
from ponderttt.models.checkpoint import load_decoder
from ponderttt.models.decoder import Decoder
from ponderttt.models.kv_cache import KVCache
from tests.ponderttt import reference

TOKENS = 90  # nearly three times the sliding window of the tiny Mistral
EXACT = 2e-6  # logits reach 8, where float32 steps by 5e-7


class Texts:
    """Four texts and their logits by one whole forward each."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.decoder = load_decoder(path, dtype=dtype)
        self.ids = [reference.code_ids(path, TOKENS, offset) for offset in (0, 200, 400, 600)]
        self.whole = [reference.our_logits(self.decoder, ids) for ids in self.ids]


@pytest.fixture(scope="module", params=reference.FAMILIES)
def texts(request: pytest.FixtureRequest) -> Texts:
    return Texts(request.getfixturevalue(request.param), torch.float64)


def assert_close(ours: Tensor, whole: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(ours, whole, rtol=0, atol=tolerance)


@settings(max_examples=12, deadline=None)
@given(cuts=st.sets(st.integers(1, TOKENS - 1), max_size=6))
def test_split_prefill_equals_the_whole(texts: Texts, cuts: set[int]) -> None:
    cache = texts.decoder.new_cache(TOKENS)
    pieces = [
        reference.forward(texts.decoder, [(cache, begin, texts.ids[0][begin:end])])[0]
        for begin, end in pairwise([0, *sorted(cuts), TOKENS])
    ]
    assert_close(torch.cat(pieces), texts.whole[0])


def decode(texts: Texts) -> Tensor:
    cache = texts.decoder.new_cache(TOKENS)
    rows = [
        reference.forward(texts.decoder, [(cache, position, [token])], decodes=True)[0]
        for position, token in enumerate(texts.ids[0])
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("spread", [False, True])
def test_decode_token_by_token_equals_the_whole(
    texts: Texts, spread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "heads_to_spread", lambda kv_heads, threads: spread)
    assert_close(decode(texts), texts.whole[0])


@pytest.mark.parametrize(
    ("kv_heads", "threads", "spread"),
    [(3, 1, False), (3, 2, True), (2, 2, False), (2, 4, True), (9, 2, False), (1, 2, True)],
)
def test_heads_are_spread_where_groups_would_leave_threads_idle(
    kv_heads: int, threads: int, spread: bool
) -> None:
    assert heads_to_spread(kv_heads, threads) is spread


@pytest.mark.parametrize("fixture", reference.FAMILIES)
def test_decode_in_float32_differs_by_rounding_only(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    texts = Texts(request.getfixturevalue(fixture), torch.float32)
    assert_close(decode(texts), texts.whole[0], reference.SPLIT_TOLERANCE)


@settings(max_examples=12, deadline=None)
@given(
    schedule=st.lists(
        st.lists(st.sampled_from([0, 1, 1, 2, 17, 40]), min_size=4, max_size=4), max_size=6
    )
)
def test_flat_batches_of_uneven_pieces_equal_each_sequence_alone(
    texts: Texts, schedule: list[list[int]]
) -> None:
    """Every step advances each of four sequences by another number of tokens, some by none."""
    caches = [texts.decoder.new_cache(TOKENS) for _ in texts.ids]
    done = [0] * len(texts.ids)
    for counts in [*schedule, [TOKENS] * len(texts.ids)]:
        ends = [min(at + count, TOKENS) for at, count in zip(done, counts, strict=True)]
        active = [i for i, end in enumerate(ends) if end > done[i]]
        if not active:
            continue
        pieces = [(caches[i], done[i], texts.ids[i][done[i] : ends[i]]) for i in active]
        # Heeded where nobody gets more than one.
        found = reference.forward(texts.decoder, pieces, decodes=True)
        for i, logits in zip(active, found, strict=True):
            assert_close(logits, texts.whole[i][done[i] : ends[i]])
        done = ends


def replay(
    decoder: Decoder, first: int, pieces: Sequence[tuple[KVCache, int, Tensor]]
) -> tuple[Tensor, ...]:
    """The blocks from `first` up over kept hidden states, nothing stored."""
    segments = [(cache, start, x.shape[0]) for cache, start, x in pieces]
    batch = decoder.batch(segments, replay=True)
    x = torch.cat([rows for _, _, rows in pieces])
    top = decoder.run(x, first, decoder.config.num_layers, batch)
    return decoder.logits(decoder.normed(top)).split([length for _, _, length in segments])


def test_replay_from_the_boundary_equals_the_whole_and_stores_nothing(texts: Texts) -> None:
    decoder, first = texts.decoder, 3
    caches, boundaries = [], []
    for ids in texts.ids:
        cache = decoder.new_cache(TOKENS)
        batch = decoder.batch([(cache, 0, TOKENS)])
        x = decoder.run(decoder.embed(torch.tensor(ids), batch), 0, first, batch)
        decoder.run(x, first, decoder.config.num_layers, batch)
        caches.append(cache)
        boundaries.append(x)
    kept = [(cache.keys.clone(), cache.values.clone()) for cache in caches]
    spans = [(0, 20), (19, 60), (63, 64), (50, TOKENS)]
    pieces = [
        (cache, begin, boundary[begin:end])
        for cache, boundary, (begin, end) in zip(caches, boundaries, spans, strict=True)
    ]
    for logits, whole, (begin, end) in zip(
        replay(decoder, first, pieces), texts.whole, spans, strict=True
    ):
        assert_close(logits, whole[begin:end])
    for cache, (keys, values) in zip(caches, kept, strict=True):
        assert torch.equal(cache.keys, keys)
        assert torch.equal(cache.values, values)


def test_replay_has_gradients_that_stop_at_the_cache(texts: Texts) -> None:
    decoder = texts.decoder
    cache = decoder.new_cache(TOKENS)
    # Read in inference mode, as serving does: the cache must still allow gradients later.
    reference.forward(decoder, [(cache, 0, texts.ids[0])])
    x = reference.noise(30, decoder.config.hidden_size).to(decoder.dtype).requires_grad_()
    (logits,) = replay(decoder, 2, [(cache, 40, x)])
    (gradient,) = torch.autograd.grad(logits[-1].logsumexp(0), x)
    assert gradient.abs().sum(dim=1).gt(0).all()
    assert not cache.keys.requires_grad


@pytest.mark.parametrize(
    ("start", "length", "window", "expected"),
    [
        (0, 3, None, ["100", "110", "111"]),
        (2, 2, None, ["1110", "1111"]),
        (0, 4, 2, ["1000", "1100", "0110", "0011"]),
        (3, 1, 2, ["0011"]),
        (1, 2, 1, ["010", "001"]),
    ],
)
def test_causal_visible_lets_a_row_see_itself_and_its_past(
    start: int, length: int, window: int | None, expected: list[str]
) -> None:
    visible = causal_visible(start, length, window, torch.device("cpu"))
    assert ["".join(str(int(v)) for v in row) for row in visible] == expected
