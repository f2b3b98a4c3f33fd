"""The store of prefixes: keys, bound, order of eviction, owners and versions."""

from __future__ import annotations

import random

import pytest
import torch

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.prefix_cache import (
    BLOCK,
    AdaptiveBlock,
    Owner,
    PrefixCache,
    TrunkBlock,
    chain_keys,
)
from ponderttt.sessions.session import Session

# Bytes of `trunk()` and of `adaptive()` with and without final activations.
TRUNK, ADAPTIVE, BARE = 48, 24, 16


def trunk() -> TrunkBlock:
    return TrunkBlock(torch.zeros(4), torch.zeros(4), torch.zeros(4))


def adaptive(*, final: bool = True) -> AdaptiveBlock:
    return AdaptiveBlock(torch.zeros(2), torch.zeros(2), torch.zeros(2) if final else None)


def session(name: str) -> Session:
    return Session(name, TTTParams(), ephemeral=False, state=None)


def enter(cache: PrefixCache, tokens: list[int], owner: Owner = None, version: int = 0) -> None:
    """What a sequence does when it has been read."""
    chain = chain_keys(tokens)
    whole = frozenset(chain)
    cache.touch(owner, chain)
    for key in chain:
        if cache.trunk(key) is None and not cache.put_trunk(key, trunk(), whole):
            break
    for key in chain:
        if not cache.put_adaptive(owner, version, key, adaptive(), whole):
            break
    cache.touch(owner, chain)


def known(cache: PrefixCache, tokens: list[int]) -> int:
    """Blocks that the cache holds of the trunk."""
    return sum(cache.trunk(key) is not None for key in chain_keys(tokens))


def test_chain_keys_cover_full_blocks_and_agree_as_far_as_the_tokens_do() -> None:
    one, other = list(range(300)), list(range(300))
    other[2 * BLOCK] = 7
    assert [len(chain_keys(one[:n])) for n in (0, 63, 64, 127, 128, 300)] == [0, 0, 1, 1, 2, 4]
    assert chain_keys(one)[:2] == chain_keys(other)[:2]
    # A block's key names all that comes before it, too.
    assert not set(chain_keys(one)[2:]) & set(chain_keys(other)[2:])
    assert len(set(chain_keys([5] * 640))) == 10


def test_bytes_never_exceed_the_capacity_and_parents_outlive_their_children() -> None:
    draw = random.Random(3)
    cache = PrefixCache(20 * TRUNK)
    owners = [None, session("a"), session("b")]
    stems = [[stem] * (3 * BLOCK) for stem in range(4)]
    prompts: list[list[int]] = []
    for _ in range(400):
        prompt = draw.choice(stems) + [draw.randrange(9)] * (BLOCK * draw.randrange(4))
        prompts.append(prompt)
        enter(cache, prompt, draw.choice(owners), draw.randrange(2))
        assert cache.nbytes <= cache.capacity
        for past in prompts[-20:]:
            held = [cache.trunk(key) is not None for key in chain_keys(past)]
            assert held == sorted(held, reverse=True)
    assert cache.trunk_counts.evictions > 100
    assert cache.adaptive_counts.evictions > 100
    blocks = [b for b in cache._entries.values() if isinstance(b, TrunkBlock)]
    assert cache.trunk_counts.nbytes == TRUNK * len(blocks)
    assert cache.adaptive_counts.nbytes == ADAPTIVE * (len(cache) - len(blocks))


def test_least_recently_used_prefix_goes_first_and_from_its_end() -> None:
    cache = PrefixCache(4 * (TRUNK + ADAPTIVE))
    old, used, new = ([n] * (2 * BLOCK) for n in range(3))
    enter(cache, old)
    enter(cache, used)
    cache.touch(None, chain_keys(old))
    enter(cache, [9] * BLOCK)
    assert (known(cache, old), known(cache, used)) == (2, 1)
    enter(cache, new)
    assert (known(cache, old), known(cache, used), known(cache, new)) == (1, 0, 2)


def test_prefix_longer_than_the_cache_keeps_its_beginning() -> None:
    cache = PrefixCache(3 * TRUNK)
    prompt = [1] * (10 * BLOCK)
    for _ in range(3):
        enter(cache, prompt)
        assert [cache.trunk(key) is not None for key in chain_keys(prompt)] == [True] * 3 + [
            False
        ] * 7
    enter(cache, [2] * BLOCK)
    assert known(cache, [2] * BLOCK) == 1
    assert cache.nbytes <= cache.capacity


@pytest.mark.parametrize("capacity", [0, TRUNK - 1])
def test_cache_too_small_for_a_block_stays_empty(capacity: int) -> None:
    cache = PrefixCache(capacity)
    enter(cache, [1] * 200)
    assert known(cache, [1] * 200) == cache.trunk_counts.nbytes == 0


def test_adaptive_entry_is_found_by_its_owner_at_its_version_only() -> None:
    cache = PrefixCache(10_000)
    mine, other, tokens = session("s"), session("s"), [1] * BLOCK
    (key,) = chain_keys(tokens)
    enter(cache, tokens, mine, 3)
    assert cache.adaptive(mine, 3, key) is not None
    # Of the same name, but another session: this one was deleted and made anew.
    assert cache.adaptive(other, 3, key) is None
    assert cache.adaptive(None, 3, key) is None
    assert cache.adaptive(mine, 4, key) is None
    enter(cache, tokens, other, 0)
    enter(cache, tokens, mine, 4)
    assert cache.adaptive(mine, 3, key) is None
    assert cache.adaptive(mine, 4, key) is not None
    assert cache.adaptive_counts.nbytes == 2 * ADAPTIVE
    cache.drop(mine)
    assert cache.adaptive(mine, 4, key) is None
    assert cache.adaptive(other, 0, key) is not None
    assert cache.trunk(key) is not None
    assert cache.adaptive_counts.nbytes == ADAPTIVE
    cache.drop(mine)


def test_entry_replaced_by_a_larger_one_is_counted_once() -> None:
    cache = PrefixCache(TRUNK + ADAPTIVE)
    (key,) = chain_keys([1] * BLOCK)
    whole = frozenset([key])
    assert cache.put_trunk(key, trunk(), whole)
    assert cache.put_adaptive(None, 0, key, adaptive(final=False), whole)
    assert cache.adaptive_counts.nbytes == BARE
    assert cache.put_adaptive(None, 0, key, adaptive(), whole)
    assert cache.nbytes == TRUNK + ADAPTIVE == cache.capacity
    assert cache.trunk_counts.evictions == cache.adaptive_counts.evictions == 0


def test_session_whose_entries_are_gone_is_not_held() -> None:
    cache = PrefixCache(2 * (TRUNK + ADAPTIVE))
    enter(cache, [1] * BLOCK, session("gone"))
    assert len(cache._owned) == 1
    enter(cache, [2] * (2 * BLOCK))
    assert list(cache._owned) == [None]


def test_cleared_cache_is_empty_and_usable() -> None:
    cache = PrefixCache(10_000)
    enter(cache, [1] * 200)
    cache.clear()
    assert (len(cache), cache.nbytes, known(cache, [1] * 200)) == (0, 0, 0)
    enter(cache, [1] * 200)
    assert known(cache, [1] * 200) == 3
