"""What a sequence knows of the versions that it was read at."""

from __future__ import annotations

import pytest

from ponderttt.engine.sequence import Sequence, Span


def reading(*reads: tuple[int, int]) -> int | None:
    """`chunk_version` of a chunk [10, 30) after reads of (count, version)."""
    sequence = Sequence(None, 0, list(range(40)), 40, None)  # type: ignore[arg-type]
    sequence.spans.append(Span(10, 30, "prompt"))
    for count, version in reads:
        sequence.computed += count
        sequence.note_read(version, count)
    return sequence.chunk_version


@pytest.mark.parametrize(
    ("reads", "version"),
    [
        ([(10, 1), (20, 3)], 3),
        ([(10, 1), (5, 2), (15, 2)], 2),
        ([(10, 2), (5, 2), (15, 3)], None),
        ([(10, 2), (5, 2), (5, 3), (10, 2)], None),
        ([(30, 4)], 4),
    ],
)
def test_chunk_has_a_version_only_where_all_of_it_was_read_at_one(
    reads: list[tuple[int, int]], version: int | None
) -> None:
    assert reading(*reads) == version
