"""Near-duplicates, against exact set similarity."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ponderttt.errors import InvalidRequestError
from tests.training.corpora.samples import repository, words
from training.corpora.duplicates import (
    NearDuplicates,
    bands,
    jaccard,
    shingles,
    without_copies,
    without_near_duplicates,
)


def reference(one: str, other: str) -> float:
    """Jaccard similarity of 5-token shingles of space-separated words."""
    first, second = one.split(), other.split()
    a = {tuple(first[i : i + 5]) for i in range(max(len(first) - 4, 1))}
    b = {tuple(second[i : i + 5]) for i in range(max(len(second) - 4, 1))}
    return len(a & b) / len(a | b)


@given(st.integers(1, 400), st.integers(0, 400), st.integers(0, 5))
def test_similarity_is_that_of_token_shingles(length: int, changed: int, seed: int) -> None:
    one = words(seed, length)
    other = list(one)
    other[min(changed, length - 1)] = "other"
    texts = " ".join(one), " ".join(other)
    similarity = jaccard(shingles(texts[0]), shingles(texts[1]))
    assert similarity == pytest.approx(reference(*texts))
    known = NearDuplicates(seed)
    known.add(repository("r", texts[0]))
    match = known.like(texts[1])
    if similarity >= 0.8:
        assert match == ("r", "m0.py", similarity)
    else:
        assert match is None


def test_shingles_ignore_white_space_and_nothing_else() -> None:
    assert shingles("def f(x):\n    return x") == shingles("def f( x ) : return x\n\n")
    assert shingles("def f(x): return x") != shingles("def f(y): return y")
    assert shingles(" \n") == frozenset()
    assert len(shingles("a b c")) == 1


def test_like_where_texts_have_no_tokens_finds_nothing() -> None:
    known = NearDuplicates(0)
    known.add(repository("r", "  \n"))
    assert known.like("  \n") is None
    assert jaccard(frozenset(), frozenset()) == 0


def test_like_of_several_takes_the_most_similar_then_the_first_by_name() -> None:
    text = words(0, 200)
    known = NearDuplicates(0)
    known.add(repository("z", " ".join(text)))
    known.add(repository("b", " ".join(text)))
    known.add(repository("a", " ".join([*text[:-1], "other"])))
    assert known.like(" ".join(text)) == ("b", "m0.py", 1.0)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_miss_at_most_one_pair_in_ten_thousand(threshold: float) -> None:
    count, rows = bands(threshold)
    assert count >= 2
    assert count * rows <= 128
    assert (1 - threshold**rows) ** count <= 1e-4


@pytest.mark.parametrize("threshold", [0.0, 1.1, float("nan"), -1])
def test_near_duplicates_where_the_threshold_is_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(InvalidRequestError, match="threshold"):
        NearDuplicates(0, threshold)


def test_near_duplicates_where_the_seed_is_out_of_range_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="seed"):
        NearDuplicates(-1)


def test_without_copies_keeps_the_first_of_each_text() -> None:
    documents = repository("r", "a", "b", "a", "a").documents
    kept, copies = without_copies(documents)
    assert [each.path for each in kept] == ["m0.py", "m1.py"]
    assert [each.path for each in copies] == ["m2.py", "m3.py"]


def test_without_near_duplicates_drops_emptied_repositories_and_says_what_went() -> None:
    text, own = " ".join(words("shared", 100)), " ".join(words("own", 100))
    known = NearDuplicates(0)
    known.add(repository("held", text))
    (kept,), dropped = without_near_duplicates(
        [repository("all", text), repository("half", own, text + " more")], known
    )
    assert (kept.name, [each.path for each in kept.documents]) == ("half", ["m0.py"])
    assert [(each.repository, each.path, each.like_repository) for each in dropped] == [
        ("all", "m0.py", "held"), ("half", "m1.py", "held"),
    ]  # fmt: skip
    assert dropped[0].similarity == 1
    assert dropped[1].similarity == pytest.approx(96 / 97)
