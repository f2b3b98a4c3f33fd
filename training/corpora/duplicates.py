"""Documents that are (nearly) the same: what has been trained on tells nothing as a test.

Nearly the same means: the Jaccard similarity of the sets of token shingles reaches a threshold.
MinHash with banded locality-sensitive hashing (Broder, 1997; Indyk and Motwani, 1998; here the
library datasketch) finds the candidates, and the exact similarity decides. A short document
inside a long one has a low similarity and is not found.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from datasketch import MinHash, MinHashLSH

from ponderttt.errors import InvalidRequestError
from training.corpora.repository import Document, Repository

log = logging.getLogger(__name__)

THRESHOLD = 0.8
_SHINGLE = 5
_PERMUTATIONS = 128
# Chance that a pair just at the threshold is no candidate. The library's own choice of bands
# balances misses against false candidates and misses one in eight; here a false candidate only
# costs one exact comparison, and a miss leaks a document.
_MISSED = 1e-4
# Shingles hashed at a time, for the sake of memory: one takes 512 bytes.
_BATCH = 20_000
_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Dropped:
    """A document that was dropped, and the one that it resembles.

    Args:
        repository, path: what was dropped.
        like_repository, like_path: what stays, in another split.
        similarity: Jaccard similarity of the two, in [threshold, 1].
    """

    repository: str
    path: str
    like_repository: str
    like_path: str
    similarity: float


def shingles(text: str) -> frozenset[int]:
    """Hashes of all runs of 5 tokens (words, numbers, single signs); white space is ignored.

    A shorter text is one shingle; a text without tokens has none.
    """
    tokens = _TOKEN.findall(text)
    starts = range(max(len(tokens) - _SHINGLE, 0) + 1) if tokens else ()
    return frozenset(
        zlib.crc32(" ".join(tokens[start : start + _SHINGLE]).encode()) for start in starts
    )


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """Shared over all elements, in [0, 1]; 0 where both are empty."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared) if shared else 0.0


def bands(threshold: float) -> tuple[int, int]:
    """Number of bands and rows per band with the fewest false candidates at few misses.

    Two documents of similarity s share a band with probability 1 - (1 - s^rows)^bands.

    Args:
        threshold: similarity in [0.1, 1] at which at most one pair in 10,000 may be missed.
    """
    fitting = [
        (_PERMUTATIONS // rows, rows)
        for rows in range(1, _PERMUTATIONS // 2 + 1)
        if (1 - threshold**rows) ** (_PERMUTATIONS // rows) <= _MISSED
    ]
    return fitting[-1]


def without_copies(documents: Iterable[Document]) -> tuple[tuple[Document, ...], list[Document]]:
    """The documents whose text no earlier one has, and the others."""
    seen: set[str] = set()
    kept: list[Document] = []
    copies: list[Document] = []
    for document in documents:
        digest = document.sha256
        (copies if digest in seen else kept).append(document)
        seen.add(digest)
    return tuple(kept), copies


class NearDuplicates:
    """Finds documents that resemble one of those added before.

    Args:
        seed: of the hash permutations.
        threshold: similarity from which two documents count as the same, in (0, 1].
    Raises:
        InvalidRequestError: the threshold or the seed is out of range.
    """

    def __init__(self, seed: int, threshold: float = THRESHOLD) -> None:
        if not 0.1 <= threshold <= 1:
            raise InvalidRequestError(
                "threshold", f"{threshold!r} lies outside [0.1, 1]; {THRESHOLD} is usual"
            )
        if not 0 <= seed < 1 << 32:
            raise InvalidRequestError("seed", f"{seed!r} lies outside [0, 2**32)")
        self.threshold = threshold
        self._empty = MinHash(num_perm=_PERMUTATIONS, seed=seed, hashfunc=int)
        self._index = MinHashLSH(num_perm=_PERMUTATIONS, params=bands(threshold))
        self._known: list[tuple[str, str, frozenset[int]]] = []

    def add(self, repository: Repository) -> None:
        """Remember all documents of a repository."""
        for document in repository.documents:
            parts = shingles(document.text)
            if parts:
                self._index.insert(len(self._known), self._minhash(parts))
                self._known.append((repository.name, document.path, parts))

    def like(self, text: str) -> tuple[str, str, float] | None:
        """Repository, path and similarity of the most similar document, or None.

        Of several equally similar ones the first by name and path counts.
        """
        parts = shingles(text)
        if not parts:
            return None
        found = [self._known[key] for key in self._index.query(self._minhash(parts))]
        scored = [(-jaccard(parts, known), name, path) for name, path, known in found]
        best = min(scored, default=None)
        if best is None or -best[0] < self.threshold:
            return None
        return best[1], best[2], -best[0]

    def _minhash(self, parts: frozenset[int]) -> MinHash:
        minhash = self._empty.copy()
        numbers = iter(parts)
        while batch := list(islice(numbers, _BATCH)):
            minhash.update_batch(batch)
        return minhash


def without_near_duplicates(
    repositories: Sequence[Repository],
    of: NearDuplicates,
    advance: Callable[[], object] = lambda: None,
) -> tuple[tuple[Repository, ...], list[Dropped]]:
    """Repositories without the documents that resemble one known to `of`.

    Args:
        repositories: to go through; they are not added to `of`.
        of: knows the documents to compare with.
        advance: called after each repository.
    Returns:
        The repositories that keep a document, and what was dropped, in their order.
    """
    kept: list[Repository] = []
    dropped: list[Dropped] = []
    for repository in repositories:
        gone = {drop.path: drop for drop in _resembling(repository, of)}
        dropped += gone.values()
        rest = tuple(each for each in repository.documents if each.path not in gone)
        if gone:
            log.info(
                "%s: %d of %d documents dropped, they resemble held-out ones (%s)",
                repository.name, len(gone), len(repository.documents),
                ", ".join(sorted({drop.like_repository for drop in gone.values()})),
            )  # fmt: skip
        if rest:
            kept.append(replace(repository, documents=rest))
        advance()
    return tuple(kept), dropped


def _resembling(repository: Repository, of: NearDuplicates) -> Iterator[Dropped]:
    for document in repository.documents:
        if match := of.like(document.text):
            log.debug("%s: %s resembles %s: %s", repository.name, document.path, *match[:2])
            yield Dropped(repository.name, document.path, *match)
