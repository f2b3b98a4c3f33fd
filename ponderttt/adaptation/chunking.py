"""Cutting token sequences into chunks, and recognising a chunk again."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence


def chunk_spans(start: int, end: int, chunk_size: int) -> list[tuple[int, int]]:
    """Half-open spans of at most `chunk_size` tokens that cover start … end-1 in order."""
    return [(at, min(at + chunk_size, end)) for at in range(start, end, chunk_size)]


def chunk_keys(token_ids: Sequence[int], chunk_size: int, least: int) -> list[str]:
    """Names under which a chunk is remembered as learned; the last is the one to look it up by.

    A full chunk is known by all its tokens. The unfinished chunk at the end of a growing text (an
    editor's prompt) is known by its whole quarters (before the first, by its first `least` tokens),
    so that it is learned again when it has grown by a quarter, not with every keystroke.

    Args:
        token_ids: of the chunk, at least one.
        chunk_size: of a full chunk.
        least: tokens below which a chunk is not learned; a quarter is no shorter.
    """
    quarter, whole = max(chunk_size // 4, least), len(token_ids)
    # The least part, too, or the text before the first quarter would be learned with every token.
    ends = sorted({end for end in (least, *range(quarter, whole + 1, quarter)) if end <= whole})
    if whole >= chunk_size or not ends:
        ends = [end for end in ends if end < whole] + [whole]
    return [chunk_hash(token_ids[:end]) for end in ends]


def chunk_hash(token_ids: Sequence[int]) -> str:
    """A name for a chunk's content: 128 bits of SHA-256 over its token ids."""
    return hashlib.sha256(array("q", token_ids).tobytes()).hexdigest()[:32]
