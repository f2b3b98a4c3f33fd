"""Records on their way to the disk, without the load waiting for it, and the running figures."""

from __future__ import annotations

import queue
import threading
from bisect import insort
from dataclasses import dataclass, field
from typing import Any, Self

from clients.results import Record, ResultFile


@dataclass(slots=True)
class Tally:
    """What has happened so far; warm-up apart."""

    sent: int = 0
    running: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    first_tokens: list[float] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """A request that has ended."""
        if record["warmup"]:
            return
        outcome = record["outcome"]
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self.tokens += record["completion_tokens"]
        if record["ttft"] is not None:
            insort(self.first_tokens, record["ttft"])

    def line(self, seconds: float) -> str:
        """For a progress bar.

        Args:
            seconds: since the load began.
        """
        figures = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        median = ""
        if self.first_tokens:
            median = f", TTFT p50 {self.first_tokens[len(self.first_tokens) // 2] * 1e3:.0f} ms"
        speed = self.tokens / seconds if seconds > 0 else 0.0
        return f"{self.running} running, {figures or 'none ended'}, {speed:.0f} tok/s{median}"


class Recorder:
    """Writes records in a thread of its own. Use it in a `with` block, whose end waits for it.

    Args:
        results: open file.
    """

    def __init__(self, results: ResultFile) -> None:
        self._results = results
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        self.tally = Tally()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._check()

    def put(self, record: Record) -> None:
        """Keep a record.

        Raises:
            PonderError: an earlier one couldn't be written.
        """
        self._check()
        self.tally.add(record)
        self._queue.put(record)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        while (record := self._queue.get()) is not None:
            try:
                self._results.append(record)
            except Exception as error:  # whatever it is, the run must not go on without its records
                self._error = error
                return
