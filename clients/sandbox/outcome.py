"""What a program may use, and what became of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import StrEnum

from ponderttt.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run of one program may use.

    Args:
        wall_seconds: from start to end, the start of the interpreter included; seconds.
        cpu_seconds: of each process, rounded up to whole seconds.
        memory_bytes: bytes of all its processes together, and of the address space of each.
        processes: processes and threads at once, its own main one included.
        file_bytes: bytes of one file, and of all its files together.
        output_bytes: bytes written to stdout and stderr together.
    Raises:
        InvalidRequestError: a value that is too small to start a Python interpreter with.
    """

    wall_seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory_bytes: int = 1 << 30
    processes: int = 32
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            whole = not name.endswith("_seconds")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                kind = "a whole number" if whole else "a number"
                raise InvalidRequestError(f"limits.{name}", f"must be {kind}, not {value!r}")
            if not (math.isfinite(value) and least <= value <= _MOST):
                raise InvalidRequestError(
                    f"limits.{name}", f"{value} is out of range; set it from {least} to {_MOST}"
                )


_LEAST: dict[str, float] = {
    "wall_seconds": 0.1,
    "cpu_seconds": 0.1,
    "memory_bytes": 64 << 20,
    "processes": 1,
    "file_bytes": 4096,
    "output_bytes": 0,
}
# A rlimit is a signed 64-bit number, and no machine is near this.
_MOST = 1 << 60
assert set(_LEAST) == {field.name for field in fields(Limits)}


DEFAULTS = Limits()
# Share of its time for which a program that is not kept waiting has a processor, at least.
_WORKED = 0.5


class Verdict(StrEnum):
    """What became of a program."""

    #: Ran to its real end, its check too.
    PASSED = "passed"
    #: Raised an exception; `SystemExit` is one, whatever its code.
    FAILED = "failed"
    #: Used up its wall or CPU time; a thread that never ends counts.
    TIMED_OUT = "timed_out"
    OUT_OF_MEMORY = "out_of_memory"
    #: Wrote more than it may to stdout and stderr.
    OUTPUT_LIMIT = "output_limit"
    #: The interpreter was ended by a signal.
    KILLED = "killed"
    #: The interpreter ended before the program did, by `os._exit` for example, with any code.
    EXITED = "exited"
    #: Reached for the means to fake a result: tracing, native code, the channel of the results, …
    TAMPERED = "tampered"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one program.

    Args:
        verdict: in one word.
        detail: why, in a line of at most 500 characters; untrusted text.
        stdout, stderr: what it wrote, together at most `limits.output_bytes`; undecodable bytes
            are replaced.
        seconds: from start to end.
        cpu_seconds: of processor time, where the wall time was used up; None elsewhere.
        ran_again: it is of a second run, see `Sandbox.run_fairly`.
    """

    verdict: Verdict
    detail: str
    stdout: str
    stderr: str
    seconds: float
    cpu_seconds: float | None = None
    ran_again: bool = False

    def is_starved(self, limits: Limits) -> bool:
        """Whether it had to wait rather than to work until its wall time was up.

        Args:
            limits: of the run.
        """
        return self.cpu_seconds is not None and self.cpu_seconds < _WORKED * min(
            limits.wall_seconds, limits.cpu_seconds
        )

    @property
    def passed(self) -> bool:
        """Whether the verdict is PASSED."""
        return self.verdict is Verdict.PASSED
