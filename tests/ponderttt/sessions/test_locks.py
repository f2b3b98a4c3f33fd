"""One server per session, on local disk and elsewhere."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ponderttt.errors import ConflictError, StoreError
from ponderttt.sessions.files import Files, LocalFiles, open_files
from ponderttt.sessions.locks import LOCKS, FileLocks, Leases, Locks, open_locks
from tests.ponderttt.sessions import stores

MakeLocks = Callable[[], Locks]


@pytest.fixture(params=["file", "lease"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> MakeLocks:
    """Makes the locks of another server of the same store."""
    if request.param == "file":
        return lambda: FileLocks(LocalFiles(tmp_path))
    url = stores.memory_url()
    return lambda: Leases(open_files(url), seconds=60.0)


def test_lock_is_one_servers_until_it_lets_go(server: MakeLocks) -> None:
    one, other = server(), server()
    one.hold("repo")
    one.hold("repo")
    one.check("repo")
    with pytest.raises(ConflictError, match="'repo' is in use by another server"):
        other.hold("repo")
    other.hold("other")
    assert (one.held(), other.held()) == (["repo"], ["other"])
    other.release("repo")  # not its own
    with pytest.raises(ConflictError):
        other.hold("repo")
    one.release("repo")
    one.release("repo")
    other.hold("repo")
    with pytest.raises(ConflictError):
        one.check("repo")


@pytest.mark.parametrize("forget", [False, True])
def test_lock_can_be_taken_again_by_whoever_comes_first(server: MakeLocks, forget: bool) -> None:
    one, other = server(), server()
    for _ in range(3):
        one.hold("repo")
        one.release("repo", forget=forget)
        other.hold("repo")
        other.release("repo", forget=forget)


def test_of_many_that_want_a_lock_one_gets_it(server: MakeLocks) -> None:
    servers, got = [server() for _ in range(8)], []

    def take(locks: Locks) -> None:
        try:
            locks.hold("repo")
        except ConflictError:
            return
        got.append(locks)

    threads = [threading.Thread(target=take, args=(locks,)) for locks in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Where two leases were written at once, both may give way, but they never both hold it.
    holding = []
    for locks in got:
        try:
            locks.check("repo")
        except ConflictError:
            continue
        holding.append(locks)
    assert len(holding) <= 1
    assert got


def test_lock_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from ponderttt.sessions.files import LocalFiles\n"
        "from ponderttt.sessions.locks import FileLocks\n"
        "locks = FileLocks(LocalFiles(Path(sys.argv[1])))\nlocks.hold('repo')\n"
        "print('held', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        locks = FileLocks(LocalFiles(tmp_path))
        with pytest.raises(ConflictError):
            locks.hold("repo")
        process.kill()
        process.wait()
    locks.hold("repo")


def test_lease_that_was_not_renewed_is_taken_over_and_its_holder_finds_out() -> None:
    files = open_files(stores.memory_url())
    one, other = Leases(files, seconds=0.2), Leases(files, seconds=0.2)
    one.hold("repo")
    with pytest.raises(ConflictError, match="its lease ends in 0 s"):
        other.hold("repo")
    for _ in range(4):  # renewed, it stays
        time.sleep(0.1)
        one.renew()
    with pytest.raises(ConflictError):
        other.hold("repo")
    time.sleep(0.3)
    other.hold("repo")
    with pytest.raises(ConflictError):
        one.check("repo")
    one.renew()
    assert one.held() == []
    other.check("repo")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"holder": 1}', b"\xff"])
def test_lease_that_can_not_be_read_counts_as_expired(text: bytes) -> None:
    files = open_files(stores.memory_url())
    files.write(f"{LOCKS}/repo", text)
    Leases(files).hold("repo")


def test_store_gets_the_locks_that_suit_it(tmp_path: Path) -> None:
    assert isinstance(open_locks(open_files(str(tmp_path))), FileLocks)
    assert isinstance(open_locks(open_files(f"file://{tmp_path}")), FileLocks)
    remote = open_files(stores.memory_url())
    assert type(remote) is Files
    assert isinstance(open_locks(remote), Leases)


def test_one_lease_that_can_not_be_renewed_does_not_keep_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = open_files(stores.memory_url())
    locks = Leases(files, seconds=0.3)
    for key in ("broken", "sound"):
        locks.hold(key)
    replace = files.replace

    def fail(path: str, data: bytes) -> None:
        if path.endswith("broken"):
            raise StoreError("the store is out of order")
        replace(path, data)

    monkeypatch.setattr(files, "replace", fail)
    until = time.monotonic() + 0.6
    while time.monotonic() < until:
        locks.renew()
        time.sleep(0.05)
    other = Leases(files, seconds=0.3)
    with pytest.raises(ConflictError):
        other.hold("sound")


def test_lease_about_to_end_is_prolonged_before_its_holder_writes() -> None:
    files = open_files(stores.memory_url())
    locks, other = Leases(files, seconds=0.4), Leases(files, seconds=0.4)
    locks.hold("repo")
    time.sleep(0.3)
    locks.check("repo")
    time.sleep(0.2)  # the first lease has ended by now
    with pytest.raises(ConflictError):
        other.hold("repo")
