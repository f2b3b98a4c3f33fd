"""The files of a store, on any file system that fsspec reaches.

What the store asks of a file system: a file that is replaced is seen old or new, never in between,
and what `sync` has returned for is still there after a crash. On local disk both are made here
(write aside, fsync, rename, fsync of the directory); object stores give them by themselves.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ponderttt.errors import InvalidRequestError, StoreError

#: Longest file that is read; a session's largest is far below.
MAX_BYTES = 1 << 31


class Files:
    """Files below one directory of an fsspec file system. Thread-safe where that is.

    Paths are relative, with `/`. Every failure of the file system is a StoreError.

    Args:
        fs: an `fsspec.AbstractFileSystem`.
        root: the directory, as `fs` calls it.
        url: how messages name it.
    """

    is_local = False

    def __init__(self, fs: Any, root: str, url: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")
        self.url = url

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    @contextmanager
    def _translated(self, doing: str, path: str) -> Iterator[None]:
        """Whatever a file system's library raises becomes a StoreError."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise StoreError(
                f"the session store {self.url} can't {doing} {path or 'its directory'}: {reason}"
            ) from error

    def read(self, path: str) -> bytes | None:
        """A file's bytes; None where it does not exist."""
        with self._translated("read", path):
            try:
                return self._read(path)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None

    def _read(self, path: str) -> bytes:
        found: bytes = self._fs.cat_file(self._path(path))
        return found

    def write(self, path: str, data: bytes) -> None:
        """Write a file whole or not at all; call `sync` before anything refers to it."""
        with self._translated("write", path):
            self._fs.pipe_file(self._path(path), data)

    def replace(self, path: str, data: bytes) -> None:
        """Write a file that outlives a crash from now on; others see all of the old or the new."""
        self.write(path, data)

    def create(self, path: str, data: bytes) -> bool:
        """Write a file unless it exists; False where it does."""
        with self._translated("create", path):
            try:
                self._fs.pipe_file(self._path(path), data, mode="create")
            except FileExistsError:
                return False
            return True

    def sync(self, *directories: str) -> None:
        """Make sure that the entries of these directories outlive a crash."""

    def names(self, directory: str = "") -> list[str]:
        """Names in a directory; none where it does not exist."""
        with self._translated("list", directory):
            try:
                self._fs.invalidate_cache(self._path(directory))
                found = self._fs.ls(self._path(directory), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted({str(each).rstrip("/").rsplit("/", 1)[-1] for each in found})

    def remove(self, path: str) -> None:
        """Delete a file or a directory with all that is in it; nothing where it does not exist.

        Not certain to outlive a crash before the next `sync` of what it was in.
        """
        with self._translated("delete", path):
            try:
                self._fs.rm(self._path(path), recursive=True)
            except FileNotFoundError:
                return
            self._fs.invalidate_cache(self._path(path))


class LocalFiles(Files):
    """The same on local disk, durable and readable by this user only.

    Args:
        root: the directory; made if missing.
    """

    is_local = True

    def __init__(self, root: Path) -> None:
        super().__init__(None, str(root), str(root))
        with self._translated("make", ""):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _read(self, path: str) -> bytes:
        with open(self._path(path), "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise OSError(f"the file is larger than {MAX_BYTES} bytes")
            return file.read()

    def write(self, path: str, data: bytes) -> None:
        # Aside first: a full disk must not cost the file that is there.
        with self._translated("write", path):
            place = self._path(path)
            aside = f"{place}.{uuid.uuid4().hex[:8]}.tmp"
            try:
                self._write(aside, data)
                os.replace(aside, place)
            except BaseException:
                Path(aside).unlink(missing_ok=True)
                raise

    def _write(self, path: str, data: bytes) -> None:
        _make_private(os.path.dirname(path))
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)

    def replace(self, path: str, data: bytes) -> None:
        self.write(path, data)
        self.sync(os.path.dirname(path))

    def create(self, path: str, data: bytes) -> bool:
        with self._translated("create", path):
            place = Path(self._path(path))
            _make_private(str(place.parent))
            try:
                with open(place, "xb") as file:
                    file.write(data)
            except FileExistsError:
                return False
            return True

    def sync(self, *directories: str) -> None:
        for directory in directories:
            with self._translated("sync", directory):
                descriptor = os.open(self._path(directory), os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def names(self, directory: str = "") -> list[str]:
        with self._translated("list", directory):
            try:
                return sorted(os.listdir(self._path(directory)))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def remove(self, path: str) -> None:
        with self._translated("delete", path):
            place = self._path(path)
            try:
                if os.path.isdir(place) and not os.path.islink(place):
                    shutil.rmtree(place)
                else:
                    os.unlink(place)
            except FileNotFoundError:
                return

    def absolute(self, path: str) -> Path:
        """Where a file lies on this machine."""
        return Path(self._path(path))


def _make_private(directory: str) -> None:
    """Make a directory and those above it, for this user only (`makedirs` opens those above)."""
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_private(os.path.dirname(directory))
        os.mkdir(directory, 0o700)


def open_files(url: str) -> Files:
    """The files below a URL (`s3://bucket/sessions`, `file:///var/lib/…`) or a local path.

    Raises:
        InvalidRequestError: a scheme that is not known here, or whose package is not installed.
        StoreError: the directory can't be made.
    """
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    if "://" not in url and "::" not in url:
        return LocalFiles(Path(url).expanduser().absolute())
    try:
        fs, root = url_to_fs(url)
    except Exception as error:  # each scheme's library has its own
        raise InvalidRequestError(
            "sessions",
            f"{url!r} can't be opened: {error}. Give a directory, or a URL of fsspec "
            "(s3:// needs the package s3fs, gs:// needs gcsfs)",
        ) from error
    if isinstance(fs, LocalFileSystem):
        return LocalFiles(Path(root))
    return Files(fs, root, url)
