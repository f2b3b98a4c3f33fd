"""`PATH`: a local directory is one repository."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ponderttt.errors import InvalidRequestError
from training.corpora.filters import Reason, folder_reason
from training.corpora.intake import File, Intake, Left
from training.corpora.repository import Repository


def read(spec: str, intake: Intake) -> Iterator[Repository]:
    """The one repository of a directory; links are not followed.

    Raises:
        InvalidRequestError: there is no such directory, or it can't be listed.
    """
    root = Path(spec).expanduser()
    if not root.is_dir():
        what = "a file" if root.exists() else "missing"
        raise InvalidRequestError(
            "corpus",
            f"{spec!r} is {what}; give a directory, git:PATH-OR-URL[@REV], installed:NAME, "
            "index:NAME==VERSION, or stack:DATASET[:CONFIG]",
        )
    name = root.resolve().name or "root"
    yield intake.repository(name, spec, _files(root), built=True)


def _files(root: Path) -> Iterator[File | Left]:
    def refuse(error: OSError) -> None:
        if Path(error.filename) == root:
            raise InvalidRequestError(
                "corpus", f"{root} can't be listed: {error.strerror}; change its permissions"
            ) from error
        unlisted.append(error.filename)

    unlisted: list[str] = []
    for directory, folders, files in os.walk(root, onerror=refuse):
        here = Path(directory)
        folders.sort()
        for name in [each for each in folders if folder_reason(each, built=True)]:
            # Changed in place: the walk goes on into what is left.
            folders.remove(name)
            yield Left(_relative(here / name, root), Reason.FOLDER)
        for name in sorted(files):
            path = here / name
            if path.is_symlink() or not path.is_file():
                yield Left(_relative(path, root), Reason.IRREGULAR)
            else:
                yield File(_relative(path, root), path.stat().st_size, reader(path))
    yield from (Left(_relative(Path(each), root), Reason.UNREADABLE) for each in unlisted)


def reader(path: Path) -> Callable[[int], bytes]:
    """Reads the beginning of a file when it is called."""

    def read(limit: int) -> bytes:
        with path.open("rb") as file:
            return file.read(limit)

    return read


def _relative(path: Path, root: Path) -> str:
    # A name that is no valid Unicode can't be hashed or written as JSON.
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")
