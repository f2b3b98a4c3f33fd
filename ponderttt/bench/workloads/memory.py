"""What an idle session keeps in RAM."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from ponderttt.bench.driving import taught
from ponderttt.bench.lab import Lab
from ponderttt.bench.workload import Comparison, Sample, Side, Target
from ponderttt.errors import UnavailableError

_STATM = Path("/proc/self/statm")


class IdleSession:
    """Growth of the process per session that has learned and now waits outside the bank."""

    name = "idle-session"
    unit = "bytes"
    comparisons = (
        Comparison(
            "memory per idle session in RAM",
            "its adapter + optimiser state",
            "resident",
            "state",
            Target(1.1, 0.0, "lower"),
        ),
    )

    def open(self, lab: Lab, stack: ExitStack) -> Mapping[str, Side]:
        """A bank of one slot, so that all sessions but the last are idle in RAM."""
        count = lab.pick(16, 4)
        core = lab.core(adapter_slots=1)
        lessons = lab.stream(self.name)
        state = core.bank.fresh_state().nbytes

        def resident(number: int) -> Sample:
            first = taught(core, f"{number}-first", lessons.take(32))
            before = _resident_bytes()
            names = [taught(core, f"{number}-{i}", lessons.take(32)) for i in range(count)]
            grown = _resident_bytes() - before
            for name in (first, *names):
                core.delete_session(name)
            return Sample(grown / count)

        return {"resident": resident, "state": lambda _: Sample(float(state))}


def _resident_bytes() -> int:
    if not _STATM.is_file():
        raise UnavailableError("this system does not tell how much memory a process has")
    gc.collect()
    # What was freed before would else be filled first, unseen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
