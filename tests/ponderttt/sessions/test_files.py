"""Files of a store: durable on local disk, the same on other file systems, private."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from ponderttt.errors import InvalidRequestError, StoreError
from ponderttt.sessions.files import Files, LocalFiles, open_files
from tests.ponderttt.sessions import stores


@pytest.fixture(params=["local", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    """Files on local disk, and in memory."""
    return open_files(str(tmp_path / "root") if request.param == "local" else stores.memory_url())


def test_what_is_written_can_be_read_listed_and_removed(files: Files) -> None:
    assert files.read("a/b") is None
    assert files.names() == files.names("a") == []
    files.write("a/b", b"one")
    files.replace("a/b", b"two")
    files.write("a/c/d", b"three")
    files.sync("a", "a/c", "")
    assert files.read("a/b") == b"two"
    assert files.read("a") is None
    assert (files.names(), files.names("a")) == (["a"], ["b", "c"])
    files.remove("a/b")
    files.remove("a/b")
    assert files.names("a") == ["c"]
    files.remove("a")
    assert files.read("a/c/d") is None
    assert files.names("a") == []


def test_create_writes_only_where_there_is_nothing(files: Files) -> None:
    assert files.create("x/y", b"one")
    assert not files.create("x/y", b"two")
    assert files.read("x/y") == b"one"


def test_local_files_are_this_users_alone(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path / "root")
    files.write("a/b", b"")
    files.replace("a/c", b"")
    for path in (tmp_path / "root").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE((tmp_path / "root").stat().st_mode) == 0o700


def test_everything_written_is_synced_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename may only be seen once the file's contents and then the directory are on disk."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).suffix}")
        fsync(descriptor)

    def note_replace(source: str, target: str) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    LocalFiles(tmp_path).replace("a.json", b"text")
    assert calls == ["sync .tmp", "rename", "sync "]


def test_failed_replacement_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = LocalFiles(tmp_path)
    files.replace("a", b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match="can't write a: No space left on device"):
        files.replace("a", b"new")
    assert files.names() == ["a"]
    assert files.read("a") == b"old"


def test_link_in_the_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"theirs")
    files = LocalFiles(tmp_path / "root")
    link = tmp_path / "root" / "link"
    link.symlink_to(tmp_path / "outside")
    files.write("link", b"mine")
    assert (files.read("link"), link.is_symlink()) == (b"mine", False)
    link.unlink()
    link.symlink_to(tmp_path / "outside")
    files.remove("link")
    assert (tmp_path / "outside").read_bytes() == b"theirs"


def test_directory_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="file/store can't make its directory"):
        LocalFiles(tmp_path / "file" / "store")


@pytest.mark.parametrize("url", ["nonsense://bucket", "s4://x"])
def test_url_that_means_nothing_is_refused_with_what_would(url: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"sessions: .*Give a directory, or a URL"):
        open_files(url)
