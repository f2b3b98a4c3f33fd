"""For users who accept the risk: the same runner and limits, and no walls."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile

from clients.sandbox.base import Sandbox
from clients.sandbox.checks import Check
from clients.sandbox.outcome import DEFAULTS, Limits, Outcome
from clients.sandbox.supervise import RUNNER, Channel, popen, runner_command, supervise


class UnsandboxedRunner(Sandbox):
    """Runs programs as the user, with the user's files and network.

    The limits of `Limits` hold, except that processes are not counted, and that one which starts a
    session of its own outlives the run.
    """

    def run(self, program: str, limits: Limits = DEFAULTS, *, check: str | None = None) -> Outcome:
        """As `Sandbox.run`, without a sandbox."""
        with tempfile.TemporaryDirectory(prefix="ponderttt-", ignore_cleanup_errors=True) as home:

            def start(channel: Channel, prepared: Check) -> subprocess.Popen[bytes]:
                command = runner_command(str(RUNNER), channel, 0, limits, 0, prepared)
                environment = {"PATH": "/usr/bin:/bin", "HOME": home, "LANG": "C.UTF-8"}
                passed = (channel.source, channel.result)
                return popen(command, passed, cwd=home, env=environment)

            return supervise(start, _kill, program, limits, check)


def _kill(process: subprocess.Popen[bytes]) -> None:
    # It leads a process group of its own.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
