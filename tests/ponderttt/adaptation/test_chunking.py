"""Chunks: spans that tile a text, and names for their contents."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ponderttt.adaptation.chunking import chunk_hash, chunk_spans

TOKENS = st.lists(st.integers(0, 2**31), min_size=1, max_size=40)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 200))
def test_spans_of_any_range_tile_it_in_order(start: int, length: int, size: int) -> None:
    spans = chunk_spans(start, start + length, size)
    covered = [place for begin, end in spans for place in range(begin, end)]
    assert covered == list(range(start, start + length))
    assert all(end - begin == size for begin, end in spans[:-1])
    assert all(0 < end - begin <= size for begin, end in spans)


def test_spans_of_a_known_range_are_these() -> None:
    assert chunk_spans(3, 12, 4) == [(3, 7), (7, 11), (11, 12)]
    assert chunk_spans(5, 5, 4) == []


@given(TOKENS, TOKENS)
def test_hash_of_two_chunks_is_equal_where_their_tokens_are(one: list[int], two: list[int]) -> None:
    assert (chunk_hash(one) == chunk_hash(two)) == (one == two)


def test_hash_of_a_chunk_is_128_bits_of_sha256_over_its_ids() -> None:
    ids = [0, 7, 151_935]
    expected = hashlib.sha256(np.array(ids, dtype=np.int64).tobytes()).hexdigest()[:32]
    assert chunk_hash(ids) == expected
    assert chunk_hash(tuple(ids)) == expected


def test_hash_of_small_ids_does_not_depend_on_how_they_could_be_glued() -> None:
    assert chunk_hash([1, 23]) != chunk_hash([12, 3])
    assert chunk_hash([0]) != chunk_hash([0, 0])
