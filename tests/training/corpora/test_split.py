"""Splits by repository, and their records."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ponderttt.errors import InvalidRequestError
from tests.training.corpora.samples import repository, words
from training.corpora import record
from training.corpora.duplicates import jaccard, shingles
from training.corpora.repository import Repository
from training.corpora.split import NAMES, Split, split

NAME_SETS = st.sets(st.text("abcdef", min_size=1, max_size=4), min_size=3, max_size=12)
SHARES = st.sampled_from([(0.7, 0.1, 0.2), (0.5, 0.5, 0.0), (0.0, 0.0, 1.0), (0.1, 0.2, 0.7)])
SEEDS = st.integers(0, 2**32 - 1)


def names(found: Split) -> dict[str, list[str]]:
    return {place: [each.name for each in getattr(found, place)] for place in NAMES}


@given(NAME_SETS, SEEDS, SHARES, st.randoms(use_true_random=False))
def test_split_is_a_partition_and_the_same_in_any_order(
    chosen: set[str], seed: int, shares: tuple[float, float, float], shuffle: Any
) -> None:
    repositories = [repository(name) for name in sorted(chosen)]
    found = split(repositories, seed=seed, shares=shares)
    everyone = [name for members in names(found).values() for name in members]
    assert sorted(everyone) == sorted(chosen)
    for place, share in zip(NAMES, shares, strict=True):
        assert bool(getattr(found, place)) == bool(share)
    shuffle.shuffle(repositories)
    assert split(repositories, seed=seed, shares=shares) == found


@given(NAME_SETS, SEEDS)
def test_split_puts_held_out_repositories_into_test(chosen: set[str], seed: int) -> None:
    held_out = sorted(chosen)[: len(chosen) - 2]
    found = split([repository(name) for name in chosen], seed=seed, held_out=held_out)
    assert set(held_out) <= set(names(found)["test"])
    assert found.train
    assert found.validation


def test_split_of_many_keeps_to_the_shares() -> None:
    count = 2000
    shares = (0.6, 0.1, 0.3)
    many = [repository(f"r{index}", f"w{index}") for index in range(count)]
    sets = names(split(many, seed=1, shares=shares))
    for place, share in zip(NAMES, shares, strict=True):
        deviation = math.sqrt(count * share * (1 - share))
        assert abs(len(sets[place]) - count * share) < 4 * deviation


def test_split_where_a_repository_is_added_leaves_the_others_in_their_place() -> None:
    repositories = [repository(f"r{index}") for index in range(40)]
    before = names(split(repositories[:-1], seed=3))
    after = names(split(repositories, seed=3))
    moved = {place: set(after[place]) ^ set(before[place]) for place in NAMES}
    assert sorted(map(sorted, moved.values())) == [[], [], ["r39"]]


def test_split_with_another_seed_is_another_one() -> None:
    repositories = [repository(f"r{index}") for index in range(20)]
    assert names(split(repositories, seed=0)) != names(split(repositories, seed=1))


@settings(max_examples=50)
@given(SEEDS, st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=6, max_size=12))
def test_split_never_leaves_a_near_duplicate_in_train_and_never_touches_test(
    seed: int, documents: list[tuple[int, int]]
) -> None:
    # Few texts in many repositories, each with up to 30 of 100 words changed at its end.
    texts = [
        " ".join(words(which, 100 - cut) + words((which, cut), cut)) for which, cut in documents
    ]
    repositories = [
        repository(f"r{index}", text, " ".join(words(("own", index), 80)))
        for index, text in enumerate(texts)
    ]
    found = split(repositories, seed=seed)
    originals = {each.name: each for each in repositories}
    assert all(originals[each.name] == each for each in found.test)
    for lower, upper in (
        (found.train, (*found.validation, *found.test)), (found.validation, found.test),
    ):  # fmt: skip
        for one in (document for each in lower for document in each.documents):
            for other in (document for each in upper for document in each.documents):
                assert jaccard(shingles(one.text), shingles(other.text)) < 0.8
    # What went, went for a reason that still stands.
    kept = {(each.name, d.path): d for place in NAMES for each in getattr(found, place)
            for d in each.documents}  # fmt: skip
    assert len(kept) + len(found.dropped) == sum(len(each.documents) for each in repositories)
    for drop in found.dropped:
        assert (drop.repository, drop.path) not in kept
        like = kept[drop.like_repository, drop.like_path]
        gone = next(d for d in originals[drop.repository].documents if d.path == drop.path)
        assert jaccard(shingles(like.text), shingles(gone.text)) == drop.similarity >= 0.8


@pytest.mark.parametrize(
    ("shares", "word"),
    [((0.5, 0.2, 0.2), "sum 1"), ((1.2, -0.2, 0.0), "sum 1"), ((math.nan, 0.5, 0.5), "sum 1"),
     ((0.5, 0.5), "three")],
)  # fmt: skip
def test_split_where_shares_are_wrong_is_refused(shares: Any, word: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"shares: .*{word}"):
        split([repository(name) for name in "abc"], seed=0, shares=shares)


def test_split_of_too_few_repositories_is_refused() -> None:
    for count in range(3):
        with pytest.raises(InvalidRequestError, match=f"{count} repositories"):
            split([repository(name) for name in "abc"[:count]], seed=0)
    with pytest.raises(InvalidRequestError, match="3 held out"):
        split([repository(name) for name in "abc"], seed=0, held_out="abc")


def test_split_where_a_name_is_double_or_unknown_is_refused() -> None:
    repositories = [repository(name) for name in ("numpy", "scipy", "torch")]
    with pytest.raises(InvalidRequestError, match="same name"):
        split([*repositories, repositories[0]], seed=0)
    with pytest.raises(InvalidRequestError, match=r"'numpie' is no .*numpy"):
        split(repositories, seed=0, held_out=["numpie"])


def test_split_where_all_repositories_are_alike_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"leave nothing of train"):
        split([repository(name, "x = 1") for name in "abcd"], seed=0, shares=(0.5, 0.0, 0.5))


def sample() -> list[Repository]:
    shared = " ".join(words("shared", 100))
    return [repository(f"r{index}", shared, " ".join(words(index))) for index in range(12)]


def test_record_written_and_read_is_the_same_and_matches_its_corpus(tmp_path: Path) -> None:
    found = split(sample(), seed=5, held_out=["r3"])
    path = tmp_path / "new" / "split.json"
    record.write(path, found)
    recorded = record.read(path)
    assert recorded == found.record() == json.loads(path.read_text())
    assert recorded["dropped"]
    assert list(path.parent.iterdir()) == [path]
    record.check(split(sample(), seed=5, held_out=["r3"]), recorded)
    elsewhere = [replace(each, source="/other") for each in sample()]
    record.check(split(elsewhere, seed=5, held_out=["r3"]), recorded)


def test_record_of_another_corpus_names_the_repository_that_differs() -> None:
    repositories = sample()
    recorded = split(repositories, seed=5).record()
    changed = [*repositories[:-1], repository("r11", "something else entirely", "and more")]
    with pytest.raises(InvalidRequestError, match="r11: sha256") as caught:
        record.check(split(changed, seed=5), recorded)
    assert "r10" not in str(caught.value)
    newer = [replace(repositories[0], revision="2.0"), *repositories[1:]]
    with pytest.raises(InvalidRequestError, match=r"r0: revision is '2.0', recorded '1.0'"):
        record.check(split(newer, seed=5), recorded)
    with pytest.raises(InvalidRequestError, match="r11 is missing"):
        record.check(split(repositories[:-1], seed=5), recorded)
    with pytest.raises(InvalidRequestError, match="extra is not in the record"):
        record.check(split([*repositories, repository("extra")], seed=5), recorded)
    with pytest.raises(InvalidRequestError, match="seed is 6, recorded 5"):
        record.check(split(repositories, seed=6), recorded)


@pytest.mark.parametrize(
    ("content", "word"),
    [('{"format_version": 1, "se', "damaged"), ("[1]", "version None"), (b"\xff", "damaged"),
     ('{"format_version": 9}', "version 9"), ('{"format_version": 1}', "lacks")],
)  # fmt: skip
def test_record_where_the_file_is_bad_is_refused(
    tmp_path: Path, content: str | bytes, word: str
) -> None:
    path = tmp_path / "split.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InvalidRequestError, match=word):
        record.read(path)


def test_record_where_there_is_no_file_or_folder_to_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="can't be read"):
        record.read(tmp_path / "none.json")
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(InvalidRequestError, match="can't be written"):
        record.write(blocked / "split.json", split(sample(), seed=0))
