"""Runs untrusted Python: see `Sandbox.run` for what a program gets, `Verdict` for what is told."""

from clients.sandbox.base import Sandbox, SandboxError
from clients.sandbox.bubblewrap import BubblewrapSandbox
from clients.sandbox.opening import open_sandbox
from clients.sandbox.outcome import Limits, Outcome, Verdict
from clients.sandbox.unsandboxed import UnsandboxedRunner

__all__ = [
    "BubblewrapSandbox",
    "Limits",
    "Outcome",
    "Sandbox",
    "SandboxError",
    "UnsandboxedRunner",
    "Verdict",
    "open_sandbox",
]
