"""Episodes: one session over some of a repository's files, cut into chunks."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from ponderttt.adaptation.chunking import chunk_spans
from ponderttt.adaptation.params import MAX_CHUNK, MIN_CHUNK
from ponderttt.errors import InvalidRequestError
from ponderttt.models.tokenizer import Tokenizer
from training.corpora.repository import Repository


@dataclass(frozen=True, slots=True)
class EpisodeConfig:
    """How repositories become episodes.

    Args:
        chunk_size: tokens per chunk.
        chunks: of an episode at most; its last document is cut there.
        document_tokens: longer documents are cut.
        least_tokens: shorter documents are left out: most of such a file is one broken chunk.
        episodes: per repository at most; they share no document.
        seed: of the choice of documents.
    Raises:
        InvalidRequestError: a value is out of range.
    """

    chunk_size: int = 256
    chunks: int = 48
    document_tokens: int = 2048
    least_tokens: int = 512
    episodes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("document_tokens", "least_tokens", "episodes"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(name, f"{getattr(self, name)} is below 1")
        if not MIN_CHUNK <= self.chunk_size <= MAX_CHUNK:
            raise InvalidRequestError(
                "chunk_size",
                f"{self.chunk_size} lies outside [{MIN_CHUNK}, {MAX_CHUNK}], what can be served",
            )
        if self.chunks < 2:
            raise InvalidRequestError(
                "chunks", f"{self.chunks} is below 2; what is learned shows in a chunk that follows"
            )
        if self.document_tokens < self.chunk_size:
            raise InvalidRequestError(
                "document_tokens",
                f"{self.document_tokens} is below chunk_size {self.chunk_size}",
            )


@dataclass(frozen=True)
class Episode:
    """One session's work.

    Args:
        name: of the episode, `repository#number`.
        repository: its repository.
        paths, documents: names and token ids of the documents, in reading order.
        chunk_size: tokens per chunk.
    """

    name: str
    repository: str
    paths: tuple[str, ...]
    documents: tuple[tuple[int, ...], ...]
    chunk_size: int

    @cached_property
    def chunks(self) -> tuple[tuple[int, int, int], ...]:
        """(document, start, end) of every chunk, in reading order."""
        return tuple(
            (index, start, end)
            for index, document in enumerate(self.documents)
            for start, end in chunk_spans(0, len(document), self.chunk_size)
        )

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(len(document) for document in self.documents)


def make_episodes(
    repositories: Iterable[Repository], tokenizer: Tokenizer, config: EpisodeConfig
) -> list[Episode]:
    """Episodes of each repository; those too small for any are left out.

    Documents are drawn at random from the repository and read in the order of their paths, as
    `ponderttt adapt` reads a directory: neighbours belong together.
    """
    found = []
    for repository in repositories:
        found += _episodes_of(repository, tokenizer, config)
    return found


def _episodes_of(
    repository: Repository, tokenizer: Tokenizer, config: EpisodeConfig
) -> list[Episode]:
    order = sorted(repository.documents, key=lambda document: document.path)
    random.Random(f"{config.seed}/{repository.name}").shuffle(order)
    episodes: list[Episode] = []
    waiting = iter(order)
    for number in range(config.episodes):
        chosen: list[tuple[str, tuple[int, ...]]] = []
        room = config.chunks
        for document in waiting:
            ids = tuple(tokenizer.encode(document.text)[: config.document_tokens])
            ids = ids[: room * config.chunk_size]
            if len(ids) < min(config.least_tokens, room * config.chunk_size):
                continue
            chosen.append((document.path, ids))
            room -= -(-len(ids) // config.chunk_size)
            if room <= 0:
                break
        # One chunk has no text that follows.
        if config.chunks - room < 2:
            break
        chosen.sort()
        episodes.append(
            Episode(
                name=f"{repository.name}#{number}",
                repository=repository.name,
                paths=tuple(path for path, _ in chosen),
                documents=tuple(ids for _, ids in chosen),
                chunk_size=config.chunk_size,
            )
        )
    return episodes
