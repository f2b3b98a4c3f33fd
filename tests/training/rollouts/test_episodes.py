"""Repositories become sessions: which documents, in which order, cut where."""

from __future__ import annotations

from pathlib import Path

import pytest

from ponderttt.errors import InvalidRequestError
from ponderttt.models.tokenizer import Tokenizer
from tests.ponderttt.engine import harness
from training.corpora.repository import Document, Repository
from training.rollouts.episodes import Episode, EpisodeConfig, make_episodes

SETTINGS = {"chunk_size": 16, "chunks": 8, "document_tokens": 60, "least_tokens": 20}


@pytest.fixture
def tokenizer(tiny_llama_dir: Path) -> Tokenizer:
    return harness.load(tiny_llama_dir)[1]


def repository(name: str, functions: dict[str, int]) -> Repository:
    """Files of so many functions, no two of them alike."""
    documents = tuple(
        Document(
            path,
            "".join(f"def {path[0]}{n}(x):\n    return x + {n}\n" for n in range(count)),
            "python",
        )
        for path, count in functions.items()
    )
    return Repository(name, "test", documents, "0")


def make(tokenizer: Tokenizer, told: Repository, **settings: int) -> list[Episode]:
    return make_episodes([told], tokenizer, EpisodeConfig(**(SETTINGS | settings)))


BIG = repository("r", {f"{letter}.py": 12 for letter in "hgfedcba"})


def test_episode_keeps_to_its_limits_and_reads_in_the_order_of_paths(
    tokenizer: Tokenizer,
) -> None:
    texts = {document.path: tokenizer.encode(document.text) for document in BIG.documents}
    (found,) = make(tokenizer, BIG)
    assert found.name == "r#0"
    assert list(found.paths) == sorted(found.paths)
    assert len(found.chunks) == 8
    for path, ids in zip(found.paths, found.documents, strict=True):
        assert list(ids) == texts[path][: len(ids)]
        assert len(ids) <= 60
    assert found.tokens == sum(len(ids) for ids in found.documents)


def test_chunks_cover_every_document_in_order(tokenizer: Tokenizer) -> None:
    (found,) = make(tokenizer, BIG)
    for index, ids in enumerate(found.documents):
        read = [
            token
            for document, start, end in found.chunks
            if document == index
            for token in found.documents[document][start:end]
        ]
        assert read == list(ids)
    assert max(end - start for _, start, end in found.chunks) == 16


def test_episodes_of_a_repository_share_no_document(tokenizer: Tokenizer) -> None:
    found = make(tokenizer, BIG, episodes=9)
    paths = [path for episode in found for path in episode.paths]
    assert len(found) > 1
    assert len(paths) == len(set(paths))
    assert [episode.name for episode in found] == [f"r#{n}" for n in range(len(found))]


def test_choice_depends_on_seed_and_name_alone(tokenizer: Tokenizer) -> None:
    first = make(tokenizer, BIG)
    turned = Repository("r", "test", BIG.documents[::-1], "0")
    assert make(tokenizer, turned) == first
    assert any(make(tokenizer, BIG, seed=seed) != first for seed in range(1, 4))


def test_documents_and_repositories_that_are_too_small_are_left_out(tokenizer: Tokenizer) -> None:
    # One function has about a dozen tokens.
    (found,) = make(tokenizer, repository("r", {"a.py": 9, "b.py": 1, "c.py": 9}))
    assert found.paths == ("a.py", "c.py")
    assert make(tokenizer, repository("r", {"a.py": 1, "b.py": 1})) == []
    assert make(tokenizer, repository("r", {})) == []


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"chunk_size": 15}, "chunk_size"),
        ({"chunk_size": 4096}, "chunk_size"),
        ({"chunks": 1}, "chunks"),
        ({"document_tokens": 100}, "document_tokens"),
        ({"least_tokens": 0}, "least_tokens"),
        ({"episodes": 0}, "episodes"),
    ],
)
def test_bad_setting_is_named(values: dict[str, int], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        EpisodeConfig(**values)
    assert caught.value.param == field
