"""Which files of a repository are worth reading, and why the others are left out."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from enum import StrEnum

from ponderttt.errors import InvalidRequestError

#: Other people's code, or no code, wherever it is found.
VENDORED = frozenset(
    {
        "_vendor", "vendor", "vendored", "_vendored", "third_party", "thirdparty",
        "thirdparty_files", "extern", "_extern", "externals", "node_modules",
        "bower_components", "__pycache__", "site-packages", "generated", "_generated",
    }
)  # fmt: skip
#: What builds leave behind. In a package or a commit, `build` is a name like any other.
BUILT = frozenset({"build", "dist", "target", "venv", "env"})
_METADATA = (".dist-info", ".egg-info")
_GENERATED_NAMES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", ".pb.go", ".min.js")
# Go's convention and the mark that several code hosts and formatters look for.
_GENERATED_MARK = re.compile(r"code generated .{0,200}do not edit|@generated\b", re.IGNORECASE)
_MARK_WITHIN = 1000


class Reason(StrEnum):
    """Why a file or a folder is left out."""

    FOLDER = "hidden, vendored or generated folder"
    HIDDEN = "hidden"
    LANGUAGE = "another language"
    GENERATED = "generated"
    IRREGULAR = "link, submodule or special file"
    UNSAFE = "unsafe path"
    UNREADABLE = "unreadable"
    TOO_LARGE = "too large"
    EMPTY = "empty"
    BINARY = "binary"
    NOT_UTF8 = "not UTF-8"
    LONG_LINE = "a line too long"
    COPY = "copy of another file"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is read; every limit is at least 1.

    Args:
        file_bytes: of one file.
        line_characters: of one line; minified and generated files have longer ones.
        archive_bytes: of one wheel or source package, unpacked.
        min_documents: of a repository taken by `installed:*` or `stack:`.
        stack_repositories: taken from one `stack:` dataset.
        stack_rows: read of one `stack:` dataset.
    Raises:
        InvalidRequestError: a limit is no whole number, or less than 1.
    """

    file_bytes: int = 1_000_000
    line_characters: int = 10_000
    archive_bytes: int = 2_000_000_000
    min_documents: int = 10
    stack_repositories: int = 100
    stack_rows: int = 100_000

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidRequestError(each.name, f"{value!r} is not a whole number from 1 up")


def folder_reason(name: str, *, built: bool) -> Reason | None:
    """Why a folder of this name is not entered, or None.

    Args:
        name: of the folder alone.
        built: whether `BUILT` is left out, too.
    """
    hidden = name.startswith(".") and name not in (".", "..")
    if hidden or name in VENDORED or name.endswith(_METADATA) or (built and name in BUILT):
        return Reason.FOLDER
    return None


def path_reason(path: str, *, built: bool = False) -> Reason | None:
    """Why a file is left out, as far as its path tells, or None.

    Args:
        path: relative, with `/`.
        built: as for `folder_reason`.
    """
    *folders, name = path.split("/")
    if any(folder_reason(folder, built=built) for folder in folders):
        return Reason.FOLDER
    if name.startswith("."):
        return Reason.HIDDEN
    return Reason.GENERATED if name.endswith(_GENERATED_NAMES) else None


def decoded(raw: bytes, limits: Limits) -> str | Reason:
    """A file's text, or why it is left out.

    A byte-order mark is taken off; line ends stay as they are.

    Args:
        raw: the file, or one byte more of it than `limits.file_bytes`.
        limits: on its size and its lines.
    """
    if len(raw) > limits.file_bytes:
        return Reason.TOO_LARGE
    if not raw.strip():
        return Reason.EMPTY
    if b"\0" in raw:
        return Reason.BINARY
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Reason.NOT_UTF8
    if not text.strip():
        return Reason.EMPTY
    if max(map(len, text.splitlines())) > limits.line_characters:
        return Reason.LONG_LINE
    return Reason.GENERATED if _GENERATED_MARK.search(text[:_MARK_WITHIN]) else text
