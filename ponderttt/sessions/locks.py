"""One server per session: locks beside the stored sessions.

On local disk a lock is the operating system's (`flock`), which ends with the process. Elsewhere it
is a lease: a file with its holder and an expiry, made only where there is none, renewed while it is
held, and taken over once it has expired. Before every file of a commit the holder checks that the
lease is still its own and lasts for a while, and a version's record is only made where there is
none. What remains is a server that stands still for longer than that in the middle of writing a
tensor file: if another one has stored the same version meanwhile, the checksums don't match any
more, and the version before counts.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from typing import Protocol

from filelock import BaseFileLock, FileLock, Timeout

from ponderttt.errors import ConflictError, SessionElsewhereError, StoreError
from ponderttt.sessions.files import Files, LocalFiles

_LOG = logging.getLogger(__name__)

LOCKS = "~locks"

#: Seconds after which a lease that was not renewed may be taken over.
LEASE_SECONDS = 30.0


class Locks(Protocol):
    """Locks of this process; thread-safe. Keys are names of sessions' directories."""

    def hold(self, key: str) -> None:
        """Take a lock; nothing where this process has it.

        Raises:
            SessionElsewhereError: another server has it.
            StoreError: the store fails.
        """

    def seen(self, key: str) -> bool:
        """Whether some server has, or had, this lock: `hold` then tells whether it still has."""

    def check(self, key: str) -> None:
        """Make sure that the lock is still ours; SessionElsewhereError where it is not."""

    def release(self, key: str, *, forget: bool = False) -> None:
        """Give it back; nothing where it is not held. `forget` where the session is no more."""

    def renew(self) -> None:
        """Prolong every lock that needs it; call it every few seconds."""

    def held(self) -> list[str]:
        """Keys of the locks that are held."""


class FileLocks:
    """Locks of the operating system, for a store on local disk."""

    def __init__(self, files: LocalFiles) -> None:
        self._directory = files.absolute(LOCKS)
        self._held: dict[str, BaseFileLock] = {}
        self._guard = threading.Lock()

    def hold(self, key: str) -> None:
        """See `Locks`."""
        with self._guard:
            if key in self._held:
                return
            try:
                self._directory.mkdir(mode=0o700, exist_ok=True)
                # Taken and given back in different threads.
                lock = FileLock(self._directory / key, blocking=False, thread_local=False)
                lock.acquire()
            except Timeout as error:
                raise _taken(key, "") from error
            except OSError as error:
                raise StoreError(f"session {key!r} can't be locked: {error}") from error
            self._held[key] = lock

    def seen(self, key: str) -> bool:
        """See `Locks`."""
        return (self._directory / key).exists()

    def check(self, key: str) -> None:
        """See `Locks`."""
        if key not in self._held:
            raise _taken(key, "")

    def release(self, key: str, *, forget: bool = False) -> None:
        """See `Locks`."""
        with self._guard:
            lock = self._held.pop(key, None)
            if lock is None:
                return
            if forget:
                # Whoever opened the file before finds that its lock holds nothing, and retries.
                (self._directory / key).unlink(missing_ok=True)
            lock.release()

    def renew(self) -> None:
        """Nothing to do."""

    def held(self) -> list[str]:
        """See `Locks`."""
        return list(self._held)


class Leases:
    """Files with an expiry, for every other store.

    Args:
        files: the store's.
        seconds: a lease's length; clocks of the servers must agree to a fraction of it.
    """

    def __init__(self, files: Files, seconds: float = LEASE_SECONDS) -> None:
        self._files = files
        self._seconds = seconds
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._held: dict[str, float] = {}  # until when
        self._guard = threading.Lock()

    def hold(self, key: str) -> None:
        """See `Locks`."""
        if key in self._held:
            return
        path = f"{LOCKS}/{key}"
        until = time.time() + self._seconds
        if not self._files.create(path, self._lease(until)):
            holder, expires = self._read(path)
            if holder != self._holder and expires > time.time():
                raise _taken(key, f" ({holder}; its lease ends in {expires - time.time():.0f} s)")
            self._files.replace(path, self._lease(until))
        # Of two that found it free or expired, the one whose lease is there now has it.
        holder, _ = self._read(path)
        if holder != self._holder:
            raise _taken(key, f" ({holder})")
        with self._guard:
            self._held[key] = until

    def seen(self, key: str) -> bool:
        """See `Locks`."""
        return self._files.read(f"{LOCKS}/{key}") is not None

    def check(self, key: str) -> None:
        """See `Locks`; a lease that may end while its holder writes is prolonged first."""
        self._check_holder(key)
        if time.time() > self._held.get(key, 0.0) - self._seconds / 3:
            self._prolong(key)
            # Others may take over what has expired; of two, the one whose lease is there has it.
            self._check_holder(key)

    def _check_holder(self, key: str) -> None:
        holder, _ = self._read(f"{LOCKS}/{key}")
        if key not in self._held or holder != self._holder:
            self._forget(key)
            raise _taken(key, f" ({holder or 'the lease was lost'})")

    def _prolong(self, key: str) -> None:
        until = time.time() + self._seconds
        self._files.replace(f"{LOCKS}/{key}", self._lease(until))
        with self._guard:
            if key in self._held:
                self._held[key] = until

    def release(self, key: str, *, forget: bool = False) -> None:
        """See `Locks`."""
        if key not in self._held:
            return
        self._forget(key)
        path = f"{LOCKS}/{key}"
        if self._read(path)[0] == self._holder:
            self._files.remove(path)

    def renew(self) -> None:
        """See `Locks`."""
        soon = time.time() + self._seconds * 2 / 3
        for key, until in list(self._held.items()):
            if until > soon:
                continue
            try:
                self._check_holder(key)
                self._prolong(key)
            except ConflictError:
                continue  # found out at the next commit
            except StoreError as error:
                _LOG.warning("the lease of session %s is not renewed: %s", key, error)

    def held(self) -> list[str]:
        """See `Locks`."""
        return list(self._held)

    def _forget(self, key: str) -> None:
        with self._guard:
            self._held.pop(key, None)

    def _lease(self, until: float) -> bytes:
        return json.dumps({"holder": self._holder, "expires": until}).encode()

    def _read(self, path: str) -> tuple[str, float]:
        """Holder and expiry; what can't be read has expired."""
        try:
            lease = json.loads(self._files.read(path) or b"{}")
            return str(lease["holder"]), float(lease["expires"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return "", 0.0


def open_locks(files: Files, lease_seconds: float = LEASE_SECONDS) -> Locks:
    """The locks that suit a store; those of the operating system have no use for a length."""
    return FileLocks(files) if isinstance(files, LocalFiles) else Leases(files, lease_seconds)


def _taken(key: str, by: str) -> SessionElsewhereError:
    name = key.split("~", 1)[0]
    return SessionElsewhereError(
        "session",
        f"session {name!r} is in use by another server{by}; send its requests there, or retry when "
        "that server has let go of it",
    )
