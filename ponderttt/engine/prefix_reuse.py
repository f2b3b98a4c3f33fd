"""Between sequences and the prefix cache: what need not be computed is copied in, what was is kept.

A known trunk is not run again: the sequence replays the adaptive blocks over the boundary
activations, with the fast weights of now, and reads on where the known part ends. Where its owner
read the same prefix at the same version, not even those are run, but for the last position before
a chunk's or the prompt's end: the next token is drawn, and the gate asked, from what it leaves.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ponderttt.engine.prefix_cache import (
    BLOCK,
    AdaptiveBlock,
    Owner,
    PrefixCache,
    TrunkBlock,
    chain_keys,
)
from ponderttt.engine.sequence import Sequence

_LOG = logging.getLogger(__name__)


class PrefixReuse:
    """Spares sequences the reading of what was read before. In the engine's thread only.

    Entries are copies, and hits are copied out of them, so that an entry may go at any time.

    Args:
        cache: the entries.
        first_adaptive: index of the first adaptive block.
    """

    def __init__(self, cache: PrefixCache, first_adaptive: int) -> None:
        self.cache = cache
        self._trunk = slice(0, first_adaptive)
        self._adaptive = slice(first_adaptive, None)

    def _concerns(self, sequence: Sequence) -> bool:
        observed = sequence.boundary is not None and not sequence.group.background
        return observed and self.cache.capacity > 0

    @torch.inference_mode()
    def look_up(self, sequence: Sequence) -> bool:
        """Take over the trunk's part of a prompt, as far as it is known and not read yet.

        Returns:
            Whether more is known now than before.
        """
        if not self._concerns(sequence) or sequence.computed > sequence.known:
            return False
        known, trunk = sequence.known, self.cache.trunk_counts
        if sequence.chain is None:
            sequence.chain = chain_keys(sequence.tokens)
            trunk.queries += sequence.prompt_len
            self.cache.adaptive_counts.queries += sequence.prompt_len
        for number in range(known // BLOCK, len(sequence.chain)):
            block = self.cache.trunk(sequence.chain[number])
            if block is None:
                break
            self._copy_trunk(sequence, block, number * BLOCK)
        if sequence.known == known:
            return False
        trunk.hits += sequence.known - known
        sequence.group.cached_tokens += sequence.known - known
        self.cache.touch(
            _owner(sequence, _version(sequence))[0], sequence.chain[: sequence.known // BLOCK]
        )
        return True

    @torch.inference_mode()
    def reuse(self, sequence: Sequence) -> bool:
        """Take over all that is known of a sequence that is about to be read.

        Returns:
            Whether there was anything; what is to be read next is another piece then.
        """
        more = self.look_up(sequence)
        chain = sequence.chain
        return (chain is not None and self._take_adaptive(sequence, chain)) or more

    def _copy_trunk(self, sequence: Sequence, block: TrunkBlock, start: int) -> None:
        if sequence.boundary is None:
            raise RuntimeError("a sequence that is looked up keeps boundary activations")
        at, cache = slice(start, start + BLOCK), sequence.cache
        cache.keys[self._trunk, :, at].copy_(block.keys)
        cache.values[self._trunk, :, at].copy_(block.values)
        sequence.boundary[at].copy_(block.boundary)
        sequence.known = at.stop

    def _take_adaptive(self, sequence: Sequence, chain: tuple[bytes, ...]) -> bool:
        version = _version(sequence)
        owner, cached = _owner(sequence, version)
        begun = sequence.computed
        # Of the past, nothing may have been read at another version.
        if not cached or not sequence.is_pure(version):
            return False
        # A rival knows the trunk's part to the prompt's end, which may lie within a block.
        end = min(sequence.known, sequence.chunk_end - 1, len(chain) * BLOCK)
        while sequence.computed < end:
            number = sequence.computed // BLOCK
            block = self.cache.adaptive(owner, version, chain[number])
            # Where final activations are kept, they are kept of all positions.
            if block is None or (sequence.final is not None and block.final is None):
                break
            before = sequence.computed
            self._copy(sequence, block, number * BLOCK, end)
            sequence.note_read(version, sequence.computed - before)
        # Looked up is a prompt once, whoever reads it.
        if sequence is not sequence.group.rival:
            self.cache.adaptive_counts.hits += sequence.computed - begun
        return sequence.computed > begun

    def _copy(self, sequence: Sequence, block: AdaptiveBlock, origin: int, end: int) -> None:
        """Advance to the block's end or to `end`; the block begins at `origin`."""
        start, stop = sequence.computed, min(origin + BLOCK, end)
        here, there = slice(start, stop), slice(start - origin, stop - origin)
        cache = sequence.cache
        cache.keys[self._adaptive, :, here].copy_(block.keys[:, :, there])
        cache.values[self._adaptive, :, here].copy_(block.values[:, :, there])
        if sequence.final is not None and block.final is not None:
            sequence.final[here].copy_(block.final[there])
        sequence.computed = cache.length = stop

    def keep(self, sequence: Sequence) -> None:
        """Enter what a sequence has read, as far as there is room for it.

        Positions whose past was read at several versions have trunk entries only, and so have those
        of a version that is outdated or whose weights live for one request. Where that fails, the
        cache is emptied.
        """
        try:
            self._enter(sequence)
        except Exception:  # no memory, most likely; the request itself goes on
            _LOG.exception("prefix of request %s not kept; emptying the cache", sequence.group.id)
            self.cache.clear()

    @torch.inference_mode()
    def _enter(self, sequence: Sequence) -> None:
        if sequence.boundary is None or not self._concerns(sequence):
            return
        chain = chain_keys(sequence.tokens[: sequence.computed])
        owner, cached = _owner(sequence, sequence.pure_version)
        self.cache.touch(owner, chain)
        stored = self._keep_trunk(sequence, chain, sequence.boundary)
        if cached:
            self._keep_adaptive(sequence, owner, chain, min(stored, sequence.pure_end // BLOCK))
        self.cache.touch(owner, chain)

    def _keep_trunk(self, sequence: Sequence, chain: tuple[bytes, ...], boundary: Tensor) -> int:
        """Returns how many of the chain's blocks are there."""
        cache, whole = sequence.cache, frozenset(chain)
        for number, key in enumerate(chain):
            if self.cache.trunk(key) is not None:
                continue
            at = slice(number * BLOCK, (number + 1) * BLOCK)
            block = TrunkBlock(
                cache.keys[self._trunk, :, at].clone(),
                cache.values[self._trunk, :, at].clone(),
                boundary[at].clone(),
            )
            if not self.cache.put_trunk(key, block, whole):
                return number
        return len(chain)

    def _keep_adaptive(
        self, sequence: Sequence, owner: Owner, chain: tuple[bytes, ...], blocks: int
    ) -> None:
        cache, whole, version = sequence.cache, frozenset(chain), sequence.pure_version
        final = sequence.final
        for number, key in enumerate(chain[:blocks]):
            old = self.cache.adaptive(owner, version, key)
            if old is not None and (final is None or old.final is not None):
                continue
            at = slice(number * BLOCK, (number + 1) * BLOCK)
            block = AdaptiveBlock(
                cache.keys[self._adaptive, :, at].clone(),
                cache.values[self._adaptive, :, at].clone(),
                final[at].clone() if final is not None else None,
            )
            if not self.cache.put_adaptive(owner, version, key, block, whole):
                return


def _version(sequence: Sequence) -> int:
    """Of the weights that it reads now; 0 of the base model's."""
    session = sequence.group.session
    return 0 if session is None or sequence.base else session.version


def _owner(sequence: Sequence, version: int) -> tuple[Owner, bool]:
    """Whose entries a sequence reads or makes at a version, and whether they are of any use.

    All begin as fresh weights, which change nothing: until their first commit they are the base
    model, whose entries serve everybody. Weights that live for one request nobody reads later.
    """
    session = sequence.group.session
    if session is None or sequence.base or not version:
        return None, True
    if session.ephemeral:
        return None, False
    return session, version == session.version
