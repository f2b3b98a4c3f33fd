"""Chunks: spans that tile a text, and names for their contents."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ponderttt.adaptation.chunking import chunk_hash, chunk_keys, chunk_spans

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


def test_keys_of_a_growing_chunk_change_with_every_quarter() -> None:
    ids = list(range(64))
    looked_up = [chunk_keys(ids[:length], 64, 8)[-1] for length in range(8, 65)]
    names = [chunk_hash(ids[:length]) for length in (8, 16, 32, 48, 64)]
    assert looked_up == [names[0]] * 8 + [names[1]] * 16 + [names[2]] * 16 + [names[3]] * 16 + [
        names[4]
    ]


@given(TOKENS, st.integers(16, 48), st.integers(2, 64), st.integers(0, 9))
def test_keys_of_a_learned_chunk_make_every_beginning_of_it_seen(
    ids: list[int], size: int, least: int, cut: int
) -> None:
    ids = ids[:size]
    part = ids[: max(len(ids) - cut, 1)]
    if len(part) >= min(least, size):
        assert chunk_keys(part, size, least)[-1] in chunk_keys(ids, size, least)


def test_keys_of_a_full_chunk_name_its_whole_and_its_quarters() -> None:
    ids = list(range(64))
    names = [chunk_hash(ids[:length]) for length in (8, 16, 32, 48, 64)]
    assert chunk_keys(ids, 64, 8) == names
    assert chunk_keys([*ids[:63], 99], 64, 8)[-1] not in names


def test_keys_of_a_chunk_below_the_least_length_name_all_of_it() -> None:
    assert chunk_keys([1, 2, 3], 64, 8) == [chunk_hash([1, 2, 3])]
