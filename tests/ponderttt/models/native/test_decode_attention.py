"""The kernel for one new position per sequence, against attention in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ponderttt.models.kv_cache import KVCache
from ponderttt.models.native.decode_attention import DecodeAttention
from tests.ponderttt import reference

LAYERS, CAPACITY, SIZE = 2, 400, 64
# Lengths around the kernel's own steps of 16 and 128 positions.
LENGTHS = [0, 1, 15, 16, 17, 127, 128, 129, 300, 399]


def caches(kv_heads: int, lengths: list[int]) -> list[KVCache]:
    found = []
    for seed, _ in enumerate(lengths):
        cache = KVCache(LAYERS, kv_heads, SIZE, CAPACITY, torch.device("cpu"), torch.float32)
        cache.keys.copy_(reference.noise(*cache.keys.shape, seed=2 * seed))
        cache.values.copy_(reference.noise(*cache.values.shape, seed=2 * seed + 1))
        found.append(cache)
    return found


def rows(count: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as a decoder has them: parts of one matrix."""
    joined = reference.noise(count, heads + 2 * kv_heads, SIZE, seed=99)
    # So large that some weights are very uneven.
    return 3 * joined[:, :heads], *joined[:, heads:].split(kv_heads, dim=1)


def exact(cache: KVCache, layer: int, at: int, window: int | None, q: Tensor) -> Tensor:
    first = 0 if window is None else max(at + 1 - window, 0)
    keys, values = (e[layer, :, first : at + 1].double() for e in (cache.keys, cache.values))
    grouped = q.double().view(keys.shape[0], -1, SIZE)
    weights = torch.softmax(grouped @ keys.transpose(1, 2) / math.sqrt(SIZE), dim=-1)
    return (weights @ values).flatten()


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (14, 2), (4, 4), (8, 1), (5, 1)])
def test_attention_is_that_of_every_sequence_by_itself(
    heads: int, kv_heads: int, window: int | None
) -> None:
    stores, (q, k, v) = caches(kv_heads, LENGTHS), rows(len(LENGTHS), heads, kv_heads)
    attend = DecodeAttention(list(zip(stores, LENGTHS, strict=True)), window)
    for layer in range(LAYERS):
        found = attend(layer, q, k, v)
        for index, (cache, at) in enumerate(zip(stores, LENGTHS, strict=True)):
            assert torch.equal(cache.keys[layer, :, at], k[index])
            assert torch.equal(cache.values[layer, :, at], v[index])
            wanted = exact(cache, layer, at, window, q[index])
            torch.testing.assert_close(found[index].double(), wanted, rtol=1e-5, atol=5e-6)


def test_nothing_but_the_new_row_is_written() -> None:
    stores, (q, k, v) = caches(3, LENGTHS), rows(len(LENGTHS), 9, 3)
    before = [(cache.keys.clone(), cache.values.clone()) for cache in stores]
    DecodeAttention(list(zip(stores, LENGTHS, strict=True)), None)(1, q, k, v)
    for (keys, values), cache, at in zip(before, stores, LENGTHS, strict=True):
        keys[1, :, at] = cache.keys[1, :, at]
        values[1, :, at] = cache.values[1, :, at]
        assert torch.equal(keys, cache.keys)
        assert torch.equal(values, cache.values)


@pytest.mark.parametrize("heads", [9, 3])
def test_a_sequence_does_not_depend_on_those_beside_it(heads: int) -> None:
    stores, (q, k, v) = caches(3, LENGTHS), rows(len(LENGTHS), heads, 3)
    together = DecodeAttention(list(zip(stores, LENGTHS, strict=True)), None)(0, q, k, v)
    for index, place in enumerate(zip(stores, LENGTHS, strict=True)):
        one = slice(index, index + 1)
        alone = DecodeAttention([place], None)(0, q[one], k[one], v[one])
        assert torch.equal(alone[0], together[index])


def test_large_scores_neither_overflow_nor_vanish() -> None:
    (cache,), (q, k, v) = caches(1, [300]), rows(1, 2, 1)
    cache.keys[:, :, 7] = 40 * q[0, 0]
    cache.keys[:, :, 200] = 50 * q[0, 0]
    found = DecodeAttention([(cache, 300)], None)(0, q, k, v)
    assert found.isfinite().all()
    torch.testing.assert_close(found[0, :SIZE], cache.values[0, 0, 200])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_not_hidden(value: float) -> None:
    (cache,), (q, k, v) = caches(1, [300]), rows(1, 1, 1)
    cache.keys[0, 0, 5, 0] = value * q[0, 0, 0].sign()
    assert DecodeAttention([(cache, 300)], None)(0, q, k, v).isnan().all()


def test_a_row_beyond_the_cache_is_refused() -> None:
    with pytest.raises(IndexError, match="position 400"):
        DecodeAttention([(caches(1, [0])[0], CAPACITY)], None)


def test_shapes_without_a_kernel_are_told_apart() -> None:
    fitting = caches(3, [0])[0]
    assert DecodeAttention.fits(fitting, 9)
    assert not DecodeAttention.fits(fitting, 27)
    small = KVCache(1, 1, 32, 8, torch.device("cpu"), torch.float32)
    exact_one = KVCache(1, 1, SIZE, 8, torch.device("cpu"), torch.float64)
    assert not DecodeAttention.fits(small, 1)
    assert not DecodeAttention.fits(exact_one, 1)
