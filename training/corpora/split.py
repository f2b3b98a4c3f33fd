"""Training, validation and test: by repository, never by file.

A repository's place is a hash of the seed and its name, so that adding a repository leaves the
others where they are, whatever order they come in.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tqdm import tqdm

from ponderttt.errors import InvalidRequestError
from training.corpora import record
from training.corpora.duplicates import (
    THRESHOLD,
    Dropped,
    NearDuplicates,
    without_near_duplicates,
)
from training.corpora.repository import Repository

log = logging.getLogger(__name__)

NAMES = ("train", "validation", "test")
SHARES = (0.7, 0.1, 0.2)


@dataclass(frozen=True, slots=True)
class Split:
    """Three sets of repositories that share no repository and no similar document.

    Args:
        train, validation, test: sorted by name.
        seed, shares, held_out, threshold: as given to `split`.
        dropped: documents taken out of `train` and `validation`; a repository all of whose
            documents were is in no set.
    """

    train: tuple[Repository, ...]
    validation: tuple[Repository, ...]
    test: tuple[Repository, ...]
    seed: int
    shares: tuple[float, float, float]
    held_out: tuple[str, ...]
    threshold: float
    dropped: tuple[Dropped, ...]

    def record(self) -> dict[str, Any]:
        """What `record.write` keeps of it, for JSON."""
        return record.of(self)


def split(
    repositories: Sequence[Repository],
    *,
    seed: int,
    shares: tuple[float, float, float] = SHARES,
    held_out: Sequence[str] = (),
    threshold: float = THRESHOLD,
    progress: bool = False,
) -> Split:
    """Divide repositories, and drop what one set would tell about another.

    Each repository goes by itself to a set with the probability that is the set's share. Where
    that leaves a set of a positive share empty, it gets the one repository whose hash lies
    nearest to the set's range, so that small corpora can be split, too. The test set stays as it
    is. Documents that resemble one of it are dropped from the validation set, and those that
    resemble one of either from the training set.

    Args:
        repositories: with unique names; their order does not matter.
        seed: in [0, 2**32).
        shares: of train, validation and test, each in [0, 1], with the sum 1.
        held_out: names of repositories that go to the test set in any case, beside its share.
        threshold: Jaccard similarity of two documents from which one of them is dropped.
        progress: whether to show a progress bar on stderr, where that is a terminal; comparing
            takes about a second per 5 MB of text.
    Raises:
        InvalidRequestError: shares, seed or threshold are out of range, two repositories have
            one name, a held-out name is unknown, there are too few repositories, or nothing is
            left of the training set.
    """
    _check_shares(shares)
    known = NearDuplicates(seed, threshold)
    by_name = _by_name(repositories, held_out)
    places = _places({name: _hash(seed, name) for name in by_name}, shares, frozenset(held_out))
    train, validation, test = (
        tuple(by_name[name] for name in sorted(by_name) if places[name] == place)
        for place in range(3)
    )
    with tqdm(
        desc="near-duplicates", total=len(train) + 2 * len(validation) + len(test),
        unit=" repositories", disable=None if progress else True,
    ) as bar:  # fmt: skip
        _add(test, known, bar)
        validation, dropped = without_near_duplicates(validation, known, bar.update)
        _add(validation, known, bar)
        train, more = without_near_duplicates(train, known, bar.update)
    for name, share, kept in zip(NAMES, shares, (train, validation, test), strict=True):
        if share and not kept:
            raise InvalidRequestError(
                "corpus", f"near-duplicates leave nothing of {name}; add repositories"
            )
    if dropped or more:
        log.info(
            "near-duplicates dropped: %d documents of train, %d of validation",
            len(more), len(dropped),
        )  # fmt: skip
    return Split(
        train, validation, test, seed, shares, tuple(sorted(set(held_out))), threshold,
        (*more, *dropped),
    )  # fmt: skip


def _add(repositories: Sequence[Repository], known: NearDuplicates, bar: tqdm[NoReturn]) -> None:
    for each in repositories:
        known.add(each)
        bar.update()


def _check_shares(shares: tuple[float, float, float]) -> None:
    right = len(shares) == 3 and all(0 <= share <= 1 for share in shares)
    if not right or not math.isclose(math.fsum(shares), 1, abs_tol=1e-9):
        raise InvalidRequestError(
            "shares", f"{shares!r} must be three numbers in [0, 1] with the sum 1"
        )


def _by_name(repositories: Sequence[Repository], held_out: Sequence[str]) -> dict[str, Repository]:
    found = {each.name: each for each in repositories}
    if len(found) < len(repositories):
        raise InvalidRequestError("corpus", "two repositories have the same name; leave one out")
    for name in held_out:
        if name not in found:
            close = ", ".join(difflib.get_close_matches(name, found)) or "none that is similar"
            raise InvalidRequestError(
                "held_out", f"{name!r} is no repository of the corpus; there is {close}"
            )
    return found


def _hash(seed: int, name: str) -> float:
    """Uniform in [0, 1)."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    # 53 bits: what a float holds exactly.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _places(
    hashes: Mapping[str, float], shares: tuple[float, float, float], held_out: frozenset[str]
) -> dict[str, int]:
    """Index of the set of each repository, none of them empty that has a positive share."""
    first, second = shares[0], shares[0] + shares[1]
    ranges = ((0.0, first), (first, second), (second, 1.0))
    # A share of 0 at the end must get nothing in spite of rounding in the sum.
    last = max(index for index, share in enumerate(shares) if share > 0)
    places = {
        name: 2 if name in held_out else min((value >= first) + (value >= second), last)
        for name, value in hashes.items()
    }
    for place in (index for index, share in enumerate(shares) if share > 0):
        members = list(places.values())
        if place in members:
            continue
        low, high = ranges[place]
        movable = [
            (max(low - hashes[name], hashes[name] - high), name)
            for name, current in places.items()
            if name not in held_out and members.count(current) > 1
        ]
        if not movable:
            raise InvalidRequestError(
                "corpus",
                f"{len(places)} repositories ({len(held_out)} held out) can't fill "
                f"{sum(share > 0 for share in shares)} sets; add repositories or set a share to 0",
            )
        places[min(movable)[1]] = place
    return places
