"""What the engine reports of its own running, for metrics and traces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from ponderttt.engine.outputs import Choice, ChunkReport
from ponderttt.fast_weights.bank import StepTag

PhaseKind = Literal["prefill", "decode", "write"]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One phase as it ran.

    Args:
        kind: which phase.
        tags: owner, version and READ or WRITE of each sequence in it.
        tokens: rows of the batch.
        seconds: wall time.
    """

    kind: PhaseKind
    tags: tuple[StepTag, ...]
    tokens: int
    seconds: float


class EngineObserver(Protocol):
    """Called in the engine's thread; must return at once and not raise."""

    def step(self, record: StepRecord) -> None:
        """A phase has run."""

    def first_token(self, seconds: float) -> None:
        """A request's first token, seconds after its arrival."""

    def next_token(self, seconds: float) -> None:
        """A further token, seconds after the one before."""

    def chunk(self, report: ChunkReport) -> None:
        """A chunk has been dealt with."""

    def chosen(self, choice: Choice) -> None:
        """A request whose prompt told whose weights were to answer is complete."""

    def published(self, seconds: float) -> None:
        """Fast weights are where a `Generator` reads them, after so long; from any thread."""

    def finished(
        self, outcome: str, prompt_tokens: int, generated_tokens: int, seconds: float
    ) -> None:
        """A request has ended: `stop`, `length`, `abort`, `adapted` or `error`."""


class NullObserver:
    """Observes nothing."""

    def step(self, record: StepRecord) -> None:
        """Ignore."""

    def first_token(self, seconds: float) -> None:
        """Ignore."""

    def next_token(self, seconds: float) -> None:
        """Ignore."""

    def chunk(self, report: ChunkReport) -> None:
        """Ignore."""

    def chosen(self, choice: Choice) -> None:
        """Ignore."""

    def published(self, seconds: float) -> None:
        """Ignore."""

    def finished(
        self, outcome: str, prompt_tokens: int, generated_tokens: int, seconds: float
    ) -> None:
        """Ignore."""
