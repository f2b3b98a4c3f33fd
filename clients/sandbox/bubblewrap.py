"""The sandbox made by bubblewrap."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from clients.sandbox.base import Sandbox
from clients.sandbox.checks import Check
from clients.sandbox.outcome import DEFAULTS, Limits, Outcome
from clients.sandbox.seccomp import seccomp_filter
from clients.sandbox.supervise import RUNNER, Channel, popen, python, runner_command, supervise

#: The user inside. Started by root, the sandbox maps it to `_NOBODY` outside, since the kernel
#: never limits the processes of user 0.
_UID = 1000
_NOBODY = 65534
#: What an interpreter and the tools of the system need; missing ones are left out.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_RUNNER_INSIDE = "/runner.py"
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    # An arena of the allocator reserves 128 MB of address space per thread.
    "MALLOC_ARENA_MAX": "2",
}


class BubblewrapSandbox(Sandbox):
    """No network, no home, own namespaces, a read-only system and a private /tmp.

    Args:
        bwrap: path of the program.
    """

    def __init__(self, bwrap: str) -> None:
        self.bwrap = bwrap
        self._as_root = os.geteuid() == 0 and _is_ours(_NOBODY)
        self._filter = seccomp_filter()

    def run(self, program: str, limits: Limits = DEFAULTS, *, check: str | None = None) -> Outcome:
        """As `Sandbox.run`."""

        def start(channel: Channel, prepared: Check) -> subprocess.Popen[bytes]:
            return self._start(channel, prepared, limits)

        return supervise(start, _kill, program, limits, check)

    def _start(self, channel: Channel, check: Check, limits: Limits) -> subprocess.Popen[bytes]:
        # Started by an ordinary user, bubblewrap's own process in there counts as the program's.
        uid, processes = (_UID, limits.processes) if self._as_root else (0, limits.processes + 1)
        with _Descriptors() as ours:
            options = [*_walls(limits)]
            passed = [channel.source, channel.result]
            if self._filter is not None:
                passed.append(ours.holding(self._filter))
                options += ["--seccomp", str(passed[-1])]
            if self._as_root:
                info, tell_info = ours.pipe()
                block, unblock = ours.pipe()
                passed += [tell_info, block]
                options += ["--info-fd", str(tell_info), "--userns-block-fd", str(block)]
                options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
                options += ["--uid", "0", "--gid", "0"]
            else:
                options += ["--uid", str(_UID), "--gid", str(_UID)]
            inner = runner_command(_RUNNER_INSIDE, channel, uid, limits, processes, check)
            process = popen([self.bwrap, *options, "--", *inner], tuple(passed), env={})
            if self._as_root:
                ours.close(tell_info)
                try:
                    _map_users(info)
                except (OSError, ValueError):
                    # It has ended or is about to: its own words on stderr tell more.
                    process.kill()
                os.write(unblock, b"1")
            return process


def _walls(limits: Limits) -> Iterator[str]:
    """Options of bubblewrap: what the program sees."""
    yield from (
        "--unshare-all",
        "--unshare-user",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
    )
    yield from ("--hostname", "sandbox")
    for name, value in _ENVIRONMENT.items():
        yield from ("--setenv", name, value)
    # Neither /proc nor /sys: programs don't need them, and /proc/PID/mem is a way to the secrets.
    prefixes = {sys.base_prefix, sys.base_exec_prefix, str(Path(python()).parent.parent)} - {"/usr"}
    read_only = (*_SYSTEM, *sorted(prefixes))
    # Bubblewrap would make the directories above for its own user only.
    above = {str(parent) for path in (*read_only, *_DEVICES) for parent in Path(path).parents}
    for path in sorted(above - {"/", "/usr"}):
        yield from ("--perms", "0755", "--dir", path)
    for path in read_only:
        yield from ("--ro-bind-try", path, path)
    for path in _DEVICES:
        yield from ("--dev-bind-try", path, path)
    yield from ("--ro-bind", str(RUNNER), _RUNNER_INSIDE)
    yield from ("--perms", "1777", "--size", str(limits.file_bytes), "--tmpfs", "/tmp")
    yield from ("--symlink", "/tmp", "/dev/shm", "--remount-ro", "/", "--chdir", "/tmp")


def _is_ours(uid: int) -> bool:
    """Whether our user namespace has that user; root of a container may have itself only."""
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        if first <= uid < first + count:
            return True
    return False


def _map_users(info: int) -> None:
    """Give the new user namespace its users, once bubblewrap has told its process."""
    told = b""
    while piece := os.read(info, 4096):
        told += piece
    directory = Path("/proc", str(json.loads(told)["child-pid"]))
    for name in ("uid_map", "gid_map"):
        (directory / name).write_text(f"0 0 1\n{_UID} {_NOBODY} 1\n")


def _kill(process: subprocess.Popen[bytes]) -> None:
    # Its init process dies with it, and with that everything in its process namespace.
    process.kill()


class _Descriptors:
    """Pipes that are closed at the end."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def __enter__(self) -> _Descriptors:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in list(self._open):
            self.close(descriptor)

    def pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        self._open.update(ends)
        return ends

    def holding(self, data: bytes) -> int:
        """A pipe's end from which `data`, less than a pipe holds, can be read."""
        readable, writable = self.pipe()
        os.write(writable, data)
        self.close(writable)
        return readable

    def close(self, descriptor: int) -> None:
        self._open.remove(descriptor)
        os.close(descriptor)
