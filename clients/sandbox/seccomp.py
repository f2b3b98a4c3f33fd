"""A filter of system calls: a program may not look into, or write to, another one's memory.

The runner's secrets are safe from Python code in its own process; this keeps a process that the
program starts, native code included, from reading them. It also denies memory that belongs to no
process, which the limit would not see, and the parts of the kernel that have most often been the
way out of a sandbox; no Python program needs them.
"""

from __future__ import annotations

import platform
import struct

#: ptrace, process_vm_readv, process_vm_writev, pidfd_getfd, kcmp, io_uring_setup, userfaultfd, bpf,
#: perf_event_open, keyctl, add_key, request_key, mount, umount2, pivot_root, unshare, setns,
#: memfd_create, memfd_secret, shmget; by machine, with the number by which the kernel calls the
#: machine (AUDIT_ARCH_…).
_MACHINES = {
    "x86_64": (
        0xC000003E,
        (
            *(101, 310, 311, 438, 312, 425, 323, 321, 298, 250, 248, 249, 165, 166, 155, 272, 308),
            *(319, 447, 29),
        ),
    ),
    "aarch64": (
        0xC00000B7,
        (
            *(117, 270, 271, 438, 272, 425, 282, 280, 241, 219, 217, 218, 40, 39, 41, 97, 268),
            *(279, 447, 194),
        ),
    ),
}
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE = 0, 4
_ALLOW, _DENY, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
#: System calls of the x32 interface have numbers of their own.
_X32 = 0x40000000


def seccomp_filter() -> bytes | None:
    """The filter as `bwrap --seccomp` takes it; None on machines that it doesn't know."""
    if platform.machine() not in _MACHINES:
        return None
    architecture, denied = _MACHINES[platform.machine()]
    program = [
        _instruction(_LOAD, value=_ARCHITECTURE),
        _instruction(_EQUAL, 1, 0, architecture),
        _instruction(_RETURN, value=_KILL),
        _instruction(_LOAD, value=_NUMBER),
        _instruction(_AT_LEAST, len(denied) + 1, 0, _X32),
        *(
            _instruction(_EQUAL, len(denied) - index, 0, number)
            for index, number in enumerate(denied)
        ),
        _instruction(_RETURN, value=_ALLOW),
        _instruction(_RETURN, value=_DENY),
    ]
    return b"".join(program)


def _instruction(code: int, if_true: int = 0, if_false: int = 0, value: int = 0) -> bytes:
    """`struct sock_filter`; the jumps count the instructions to be left out."""
    return struct.pack("HBBI", code, if_true, if_false, value)
