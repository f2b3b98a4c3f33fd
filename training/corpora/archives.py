"""Reading wheels (zip) and source packages (tar, zip) without unpacking them to disk."""

from __future__ import annotations

import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ponderttt.errors import InvalidRequestError
from training.corpora.filters import Reason
from training.corpora.intake import File, Left

SUFFIXES = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar")
# What the standard library raises for damaged, encrypted or unknown content.
_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError,
    RuntimeError, NotImplementedError, UnicodeDecodeError,
)  # fmt: skip


def files(archive: Path, max_bytes: int) -> Iterator[File | Left]:
    """Its regular files, in its order; each can be read until the next one is asked for.

    The top folder of a source package is taken off the paths.

    Args:
        archive: its name ends in one of `SUFFIXES`.
        max_bytes: of all files together, unpacked.
    Raises:
        InvalidRequestError: the archive is damaged, or holds more than `max_bytes`.
    """
    is_wheel = archive.name.endswith(".whl")
    members = _zip(archive) if is_wheel or archive.name.endswith(".zip") else _tar(archive)
    total = 0
    with _readable(archive):
        for member in members:
            total += member.size if isinstance(member, File) else 0
            # Checked before the next member: a tar unpacks this one to get there.
            if total > max_bytes:
                raise InvalidRequestError(
                    "corpus", f"{archive.name} holds more than {max_bytes} bytes; raise the limit"
                )
            yield _placed(member, drop=0 if is_wheel else 1)


def _placed(member: File | Left, *, drop: int) -> File | Left:
    path = PurePosixPath(member.path)
    # We write no file, but paths go into records and must mean one thing only.
    if path.is_absolute() or ".." in path.parts or "\\" in member.path:
        return Left(member.path, Reason.UNSAFE)
    short = "/".join(path.parts[drop:]) or member.path
    if isinstance(member, Left):
        return Left(short, member.reason)
    return File(short, member.size, member.read)


def _zip(archive: Path) -> Iterator[File | Left]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.is_dir():
                continue
            if kind not in (0, stat.S_IFREG):
                yield Left(info.filename, Reason.IRREGULAR)
                continue

            def read(limit: int, info: zipfile.ZipInfo = info) -> bytes:
                # The size in the directory may be a lie; no more than the limit is unpacked.
                with _readable(archive), opened.open(info) as member:
                    return member.read(limit)

            yield File(info.filename, info.file_size, read)


def _tar(archive: Path) -> Iterator[File | Left]:
    # As a stream: one pass, and the index does not grow with the archive.
    with tarfile.open(archive, mode="r|*") as opened:
        for info in opened:
            if info.isdir():
                continue
            if not info.isreg():
                yield Left(info.name, Reason.IRREGULAR)
                continue

            def read(limit: int, info: tarfile.TarInfo = info) -> bytes:
                with _readable(archive):
                    member = opened.extractfile(info)
                    return member.read(limit) if member else b""

            yield File(info.name, info.size, read)


@contextmanager
def _readable(archive: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise InvalidRequestError(
            "corpus", f"{archive} is damaged ({error}); delete it, and it is fetched again"
        ) from error
