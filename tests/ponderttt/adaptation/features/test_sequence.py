"""Sequence features against numbers worked by hand and a plain search."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ponderttt.adaptation.features.sequence import occurrences
from tests.ponderttt.adaptation.features.observations import feature, make_observation

# positions                 0  1  2    3  4  5
EXAMPLE = make_observation(
    context=[1, 2, 3], tokens=[1, 2, 9], text="ab", chunk_size=3, vocab_size=36
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("position", math.log(1 + 3 / 3)),
        ("length", math.log(3 / 3)),
        ("type_token_ratio", 1.0),
        # after 3 (new): not counted; after 1: 2 again, a hit; after 2: 9 instead of 3, a miss
        ("copy_accuracy", 1 / 2),
        # shares 2/6, 2/6, 1/6
        ("rarity", (2 * math.log(3) + math.log(6)) / 3 / math.log(36)),
        # 1 and 2 came three tokens earlier, 9 is new
        ("recency", math.log(3) / math.log(6)),
    ],
)
def test_sequence_features_of_an_example_are_what_one_counts(name: str, expected: float) -> None:
    assert feature(EXAMPLE, name) == pytest.approx(expected, abs=1e-6)


def test_sequence_features_when_one_token_repeats_for_ever() -> None:
    obs = make_observation(tokens=[5] * 8, losses=[0.1] * 7)
    assert feature(obs, "type_token_ratio") == pytest.approx(1 / 8)
    assert feature(obs, "copy_accuracy") == 1.0
    assert feature(obs, "rarity") == 0.0
    assert feature(obs, "recency") == 0.0


def test_sequence_features_when_every_token_is_new() -> None:
    obs = make_observation(tokens=list(range(10, 26)), vocab_size=256)
    assert feature(obs, "type_token_ratio") == 1.0
    assert feature(obs, "copy_accuracy") == 0.0
    assert feature(obs, "rarity") == pytest.approx(math.log(16) / math.log(256))
    assert feature(obs, "recency") == 1.0


def test_copy_accuracy_looks_across_the_chunk_s_first_edge() -> None:
    # the chunk's only token follows 4, which was followed by 7 before
    hit = make_observation(context=[4, 7, 4], tokens=[7], losses=[1.0], probes=[])
    miss = make_observation(context=[4, 7, 4], tokens=[8], losses=[1.0], probes=[])
    assert feature(hit, "copy_accuracy") == 1.0
    assert feature(miss, "copy_accuracy") == 0.0


def test_length_falls_with_a_short_last_chunk() -> None:
    full = make_observation(text="x" * 63, chunk_size=16)
    assert feature(full, "length") == pytest.approx(math.log(4))
    empty = make_observation(text="", chunk_size=16)
    assert feature(empty, "length") == pytest.approx(-math.log(16))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_occurrences_equal_a_plain_search(symbols: list[int]) -> None:
    previous, counts = occurrences(np.array(symbols, dtype=np.int64))
    for index, symbol in enumerate(symbols):
        earlier = [i for i in range(index) if symbols[i] == symbol]
        assert previous[index] == (earlier[-1] if earlier else -1)
        assert counts[index] == symbols.count(symbol)
