"""Prompts of fixed length from the source code of an installed package, the same in every run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from ponderttt.errors import UnavailableError
from ponderttt.models.tokenizer import Tokenizer

#: Always there, for the tokenizers need it, and large.
PACKAGE = "transformers"

#: Shorter files are mostly licence and imports.
_LEAST_BYTES = 4096

Prompt = tuple[int, ...]


class TextStream:
    """Token ids of a package's files, one after the other; no prompt is given out twice.

    Args:
        tokenizer: of the model.
        seed: decides on the order of the files.
        package: whose files.
    Raises:
        UnavailableError: the package has no source here.
    """

    def __init__(self, tokenizer: Tokenizer, seed: str, package: str = PACKAGE) -> None:
        files = source_files(package)
        random.Random(seed).shuffle(files)
        self._files = iter(files)
        self._tokenizer = tokenizer
        self._ahead: list[int] = []

    def take(self, length: int) -> Prompt:
        """The next `length` token ids.

        Raises:
            UnavailableError: the package has no more text.
        """
        while len(self._ahead) < length:
            path = next(self._files, None)
            if path is None:
                raise UnavailableError("the package has too little text; ask for fewer repeats")
            self._ahead += self._tokenizer.encode(path.read_text(encoding="utf-8"))
        taken, self._ahead = self._ahead[:length], self._ahead[length:]
        return tuple(taken)


class Rounds:
    """`count` prompts of `length` tokens for every round; the same for whoever asks for a round."""

    def __init__(self, stream: TextStream, count: int, length: int) -> None:
        self._stream = stream
        self._count, self._length = count, length
        self._drawn: list[list[Prompt]] = []

    def __getitem__(self, number: int) -> list[Prompt]:
        while len(self._drawn) <= number:
            self._drawn.append([self._stream.take(self._length) for _ in range(self._count)])
        return self._drawn[number]

    def __iter__(self) -> Iterator[list[Prompt]]:
        return iter(self._drawn)


def source_files(package: str) -> list[Path]:
    """Larger Python files of an installed package, in the order of their paths.

    Raises:
        UnavailableError: not installed, or without source.
    """
    spec = find_spec(package)
    roots = spec.submodule_search_locations if spec is not None else None
    if not roots:
        raise UnavailableError(f"{package} is not installed as a package here")
    files = sorted(
        path for path in Path(roots[0]).rglob("*.py") if path.stat().st_size >= _LEAST_BYTES
    )
    if not files:
        raise UnavailableError(f"{package} has no source code here")
    return files


def provenance() -> str:
    """Where prompts come from, for the record."""
    return f"{PACKAGE}=={version(PACKAGE)}"
