"""Episodes out of token ids, for tests that need no corpus."""

from __future__ import annotations

from pathlib import Path

from tests.ponderttt.engine import harness
from training.rollouts.episodes import Episode

CHUNK = 32


def episode(directory: Path, number: int, lengths: tuple[int, ...] = (96, 70, 64)) -> Episode:
    """The `number`-th episode: documents of these lengths, of real code no other episode has."""
    documents = tuple(
        harness.text(directory, number * len(lengths) + index, length)
        for index, length in enumerate(lengths)
    )
    paths = tuple(f"{index}.py" for index in range(len(lengths)))
    return Episode(f"r{number}#0", f"r{number}", paths, documents, CHUNK)
