"""Which files of a directory are worth learning."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: Directories of other people's code or of no code.
IGNORED_DIRECTORIES = frozenset(
    {"node_modules", "__pycache__", "venv", "site-packages", "build", "dist", "target"}
)
# Where git looks for a NUL, too, to tell binary files from text.
_SNIFFED = 8000


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file to learn; `path` is relative to where the walk began, with `/`."""

    path: str
    text: str

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.text.encode())


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file or directory left out, and why."""

    path: str
    reason: str


def text_files(root: Path, max_bytes: int) -> Iterator[TextFile | Skipped]:
    """The text files below `root` (or `root` itself, if it is a file), in a stable order.

    Left out: hidden files and directories, links, `IGNORED_DIRECTORIES`, files that are empty,
    binary, not in UTF-8, or larger than `max_bytes`.

    Args:
        root: a file or directory that exists.
        max_bytes: of one file.
    """
    if root.is_file():
        yield _read(root, root.name, max_bytes)
        return
    for directory, names, files in os.walk(root):
        here = Path(directory)
        # Changed in place: the walk goes on into what is left, in this order.
        names.sort()
        for name in [n for n in names if n.startswith(".") or n in IGNORED_DIRECTORIES]:
            names.remove(name)
            yield Skipped(_relative(here / name, root) + "/", "ignored directory")
        for name in sorted(files):
            path = here / name
            if name.startswith("."):
                yield Skipped(_relative(path, root), "hidden")
            elif path.is_symlink() or not path.is_file():
                yield Skipped(_relative(path, root), "not a regular file")
            else:
                yield _read(path, _relative(path, root), max_bytes)


def _read(path: Path, name: str, max_bytes: int) -> TextFile | Skipped:
    try:
        size = path.stat().st_size
        if size > max_bytes:
            return Skipped(name, f"{size} bytes, more than {max_bytes}")
        raw = path.read_bytes()
    except OSError as error:
        return Skipped(name, f"can't be read: {error.strerror}")
    if not raw.strip():
        return Skipped(name, "empty")
    if b"\0" in raw[:_SNIFFED]:
        return Skipped(name, "binary")
    try:
        return TextFile(name, raw.decode("utf-8"))
    except UnicodeDecodeError:
        return Skipped(name, "not in UTF-8")


def _relative(path: Path, root: Path) -> str:
    # A name that is no valid Unicode can't be sent as JSON.
    return path.relative_to(root).as_posix().encode("utf-8", "replace").decode()
