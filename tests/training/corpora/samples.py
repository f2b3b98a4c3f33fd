"""Repositories and files to test corpora with."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from training.corpora.filters import Limits
from training.corpora.intake import Intake
from training.corpora.repository import Document, Repository

CODE = b"def f(x):\n    return x + 1\n"


def write_files(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def intake(cache: Path, *languages: str, **limits: int) -> Intake:
    """With a minimum of one document unless told otherwise."""
    return Intake(
        frozenset(languages or ("python",)), Limits(**{"min_documents": 1, **limits}), cache
    )


def words(seed: object, count: int = 60) -> list[str]:
    source = random.Random(str(seed))
    return [f"word{source.randrange(10**9)}" for _ in range(count)]


def repository(name: str, *texts: str) -> Repository:
    """With one unrelated document per repository unless texts are given."""
    documents = tuple(
        Document(f"m{index}.py", text, "python")
        for index, text in enumerate(texts or (" ".join(words(name)),))
    )
    return Repository(name, f"test:{name}", documents, "1.0")


def paths(found: Repository) -> list[str]:
    return [each.path for each in found.documents]
