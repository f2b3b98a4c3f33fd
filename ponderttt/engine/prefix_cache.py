"""What is known of prefixes that were read before, by content, least recently used out first.

A prefix is cut into blocks of 64 tokens. A block's key is a SHA-256 hash of its tokens and the key
of the block before, so one key names everything up to there. There are two kinds of entries:

- *Trunk*: keys and values of the trunk's blocks and the boundary activations. They depend on the
  tokens alone, so all sessions and all versions of their fast weights share them.
- *Adaptive*: keys and values of the blocks above, of one owner at one version.

Trunk entries are shared by content: from the time to its first token (and from the number of cached
tokens in its answer) a client can learn that somebody has sent the same prefix lately. Where
clients must not learn that of each other, turn the cache off.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Set
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from ponderttt.sessions.session import Session

#: Tokens of a block.
BLOCK = 64

#: Session whose fast weights made an entry; None: the base model.
Owner = Session | None

_Key = bytes | tuple[Owner, bytes]


@dataclass(frozen=True, slots=True)
class TrunkBlock:
    """Keys and values [trunk layers, kv_heads, 64, head_dim]; boundary activations [64, hidden]."""

    keys: Tensor
    values: Tensor
    boundary: Tensor


@dataclass(frozen=True, slots=True)
class AdaptiveBlock:
    """Keys and values [adaptive layers, kv_heads, 64, head_dim]; hidden states after the final norm
    [64, hidden], where the sequence that was read kept them."""

    keys: Tensor
    values: Tensor
    final: Tensor | None


@dataclass(slots=True)
class PrefixCounts:
    """Of one kind of entries.

    Args:
        queries: tokens looked up.
        hits: tokens among them that did not have to be computed.
        evictions: entries that made room for others.
        nbytes: bytes held now.
    """

    queries: int = 0
    hits: int = 0
    evictions: int = 0
    nbytes: int = 0


def chain_keys(tokens: Seq[int]) -> tuple[bytes, ...]:
    """The key of every full block; block i's covers tokens[: 64 * (i + 1)]."""
    keys: list[bytes] = []
    key = b""
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        key = hashlib.sha256(key + array("q", tokens[start : start + BLOCK]).tobytes()).digest()
        keys.append(key)
    return tuple(keys)


class PrefixCache:
    """Entries of both kinds within one bound; in the engine's thread only.

    A block is always more recently used than those that continue it, so what is evicted is the end
    of a prefix, never its middle. Of an owner only the version entered last is kept.

    Args:
        capacity: bytes of the entries' tensors at most; 0 keeps nothing.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.trunk_counts = PrefixCounts()
        self.adaptive_counts = PrefixCounts()
        self._entries: OrderedDict[_Key, TrunkBlock | AdaptiveBlock] = OrderedDict()
        self._owned: dict[Owner, tuple[int, set[bytes]]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self.trunk_counts.nbytes + self.adaptive_counts.nbytes

    def trunk(self, key: bytes) -> TrunkBlock | None:
        """The trunk's entry for a block."""
        entry = self._entries.get(key)
        return entry if isinstance(entry, TrunkBlock) else None

    def adaptive(self, owner: Owner, version: int, key: bytes) -> AdaptiveBlock | None:
        """The entry of an owner at a version for a block."""
        if owner not in self._owned or self._owned[owner][0] != version:
            return None
        entry = self._entries.get((owner, key))
        return entry if isinstance(entry, AdaptiveBlock) else None

    def put_trunk(self, key: bytes, block: TrunkBlock, chain: Set[bytes]) -> bool:
        """Enter a block; False where only blocks of its own prefix, `chain`, could make room.

        The prefix must have been touched before.
        """
        return self._put(key, block, lambda other: other in chain)

    def put_adaptive(
        self, owner: Owner, version: int, key: bytes, block: AdaptiveBlock, chain: Set[bytes]
    ) -> bool:
        """Enter a block of an owner; what is kept of its other versions is dropped.

        The prefix, `chain`, must have been touched before.

        Returns:
            False where only blocks of its own prefix could make room.
        """
        if owner in self._owned and self._owned[owner][0] != version:
            self.drop(owner)

        def of_prefix(other: _Key) -> bool:
            if isinstance(other, bytes):
                return other in chain
            return other[0] is owner and other[1] in chain

        if not self._put((owner, key), block, of_prefix):
            return False
        self._owned.setdefault(owner, (version, set()))[1].add(key)
        return True

    def touch(self, owner: Owner, chain: Iterable[bytes]) -> None:
        """These blocks, from a prefix's beginning on, have just been used."""
        keys = list(chain)
        for key in reversed(keys):
            if (owner, key) in self._entries:
                self._entries.move_to_end((owner, key))
        # After the adaptive entries, which are of no use without them.
        for key in reversed(keys):
            if key in self._entries:
                self._entries.move_to_end(key)

    def drop(self, owner: Owner) -> None:
        """Forget an owner's adaptive entries."""
        for key in self._owned.pop(owner, (0, set()))[1]:
            self.adaptive_counts.nbytes -= _nbytes(self._entries.pop((owner, key)))

    def clear(self) -> None:
        """Forget all entries."""
        self._entries.clear()
        self._owned.clear()
        self.trunk_counts.nbytes = self.adaptive_counts.nbytes = 0

    def _put(
        self, key: _Key, block: TrunkBlock | AdaptiveBlock, stays: Callable[[_Key], bool]
    ) -> bool:
        old = self._entries.get(key)
        size = _nbytes(block)
        held = _nbytes(old) if old is not None else 0
        while self.nbytes - held + size > self.capacity:
            oldest = next(iter(self._entries), None)
            if oldest is None or stays(oldest):
                return False
            self._evict(oldest)
        self._counts(block).nbytes += size - held
        self._entries[key] = block
        self._entries.move_to_end(key)
        return True

    def _evict(self, key: _Key) -> None:
        block = self._entries.pop(key)
        counts = self._counts(block)
        counts.nbytes -= _nbytes(block)
        counts.evictions += 1
        if not isinstance(key, bytes):
            owner, name = key
            kept = self._owned[owner][1]
            kept.remove(name)
            if not kept:
                # A session that was deleted must not be held alive.
                del self._owned[owner]

    def _counts(self, block: TrunkBlock | AdaptiveBlock) -> PrefixCounts:
        return self.trunk_counts if isinstance(block, TrunkBlock) else self.adaptive_counts


def _nbytes(block: TrunkBlock | AdaptiveBlock) -> int:
    last = block.boundary if isinstance(block, TrunkBlock) else block.final
    size = block.keys.nbytes + block.values.nbytes
    return size if last is None else size + last.nbytes
