"""The server's key, from a file."""

from __future__ import annotations

from pathlib import Path

from ponderttt.errors import InvalidRequestError


def read_key(path: Path | None, param: str = "--api-key-file") -> str | None:
    """The first word of a file; None where no file is named.

    Raises:
        InvalidRequestError: the file can't be read or is empty.
    """
    if path is None:
        return None
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(param, f"{path} can't be read: {error}") from error
    if not words:
        raise InvalidRequestError(param, f"{path} is empty; put the key into it")
    return words[0]
