"""Cutting token sequences into chunks, and recognising a chunk again."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence


def chunk_spans(start: int, end: int, chunk_size: int) -> list[tuple[int, int]]:
    """Half-open spans of at most `chunk_size` tokens that cover start … end-1 in order."""
    return [(at, min(at + chunk_size, end)) for at in range(start, end, chunk_size)]


def chunk_hash(token_ids: Sequence[int]) -> str:
    """A name for a chunk's content: 128 bits of SHA-256 over its token ids."""
    return hashlib.sha256(array("q", token_ids).tobytes()).hexdigest()[:32]
