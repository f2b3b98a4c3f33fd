"""The key and value buffers of one sequence."""

from __future__ import annotations

import pytest
import torch

from ponderttt.models.kv_cache import KVCache


def make_cache(capacity: int = 8) -> KVCache:
    return KVCache(2, 3, 4, capacity, torch.device("cpu"), torch.float32)


def test_write_returns_everything_up_to_its_end() -> None:
    cache = make_cache()
    rows = torch.randn(5, 3, 4)
    cache.write(1, 0, rows[:3], -rows[:3])
    keys, values = cache.write(1, 3, rows[3:], -rows[3:])
    assert torch.equal(keys, rows.transpose(0, 1))
    assert torch.equal(values, -rows.transpose(0, 1))


def test_write_to_one_layer_leaves_the_others() -> None:
    cache = make_cache()
    cache.keys.zero_()
    cache.write(1, 2, torch.ones(2, 3, 4), torch.ones(2, 3, 4))
    assert cache.keys[0].eq(0).all()
    assert cache.keys[1].sum() == 2 * 3 * 4


@pytest.mark.parametrize(("start", "rows"), [(8, 1), (0, 9), (6, 3)])
def test_write_beyond_the_capacity_is_refused_and_changes_nothing(start: int, rows: int) -> None:
    cache = make_cache()
    cache.keys.zero_()
    cache.values.zero_()
    with pytest.raises(IndexError, match="cache of 8"):
        cache.write(0, start, torch.ones(rows, 3, 4), torch.ones(rows, 3, 4))
    assert cache.keys.eq(0).all()
    assert cache.values.eq(0).all()


def test_fork_goes_its_own_way() -> None:
    cache = make_cache()
    for layer in range(2):
        cache.write(layer, 0, torch.randn(5, 3, 4), torch.randn(5, 3, 4))
    cache.length = 5
    twin = cache.fork()
    assert (twin.length, twin.capacity) == (5, 8)
    assert torch.equal(twin.keys[:, :, :5], cache.keys[:, :, :5])
    assert torch.equal(twin.values[:, :, :5], cache.values[:, :, :5])
    kept = cache.keys[:, :, :5].clone()
    twin.write(0, 2, torch.ones(4, 3, 4), torch.ones(4, 3, 4))
    assert torch.equal(cache.keys[:, :, :5], kept)


def test_buffers_made_in_inference_mode_still_allow_gradients_over_them() -> None:
    with torch.inference_mode():
        cache = make_cache()
        cache.write(0, 0, torch.ones(4, 3, 4), torch.ones(4, 3, 4))
        cache.length = 4
        twin = cache.fork()
    for buffer in (cache.keys, twin.values):
        weight = torch.ones(4, requires_grad=True)
        (buffer[0, :, :4] * weight).sum().backward()
        assert weight.grad is not None
