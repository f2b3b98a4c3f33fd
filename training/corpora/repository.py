"""A repository: the unit that corpora are loaded, split and recorded by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One source file.

    Args:
        path: relative to its repository, with `/`.
        text: the whole file, decoded.
        language: one of `languages.LANGUAGES`.
    """

    path: str
    text: str
    language: str

    @property
    def sha256(self) -> str:
        """Of the text in UTF-8, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Repository:
    """The documents of one package, checkout or directory, in the order of their paths.

    Args:
        name: what splits and records call it; unique in a corpus.
        source: the spec it was loaded by.
        documents: may be empty.
        revision: version, commit, or `sha256:` and the hash of the content.
    """

    name: str
    source: str
    documents: tuple[Document, ...]
    revision: str

    @property
    def sha256(self) -> str:
        """Of all paths and texts, in hexadecimal; the order of the documents does not matter."""
        return content_sha256(self.documents)


def content_sha256(documents: Iterable[Document]) -> str:
    """One hash of paths and texts, in hexadecimal; independent of the documents' order."""
    # Both are of fixed form and free of newlines, so that no two contents share a listing.
    lines = sorted(
        f"{document.sha256} {hashlib.sha256(document.path.encode()).hexdigest()}\n"
        for document in documents
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()
