"""Reports of what a session learned from documents."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ponderttt.engine.outputs import ChunkEvent, ChunkReport, DoneEvent, TTTReport
from server.events import Events
from server.schemas.session import AdaptChunk, AdaptReport, DocumentReport
from server.schemas.ttt import Chunk, report_fields


@dataclass(slots=True)
class Lesson:
    """Documents being learned.

    Args:
        paths: what the caller calls them.
        lengths: their tokens.
        begun: seconds of the monotonic clock.
        done: tokens dealt with.
    """

    paths: Sequence[str | None]
    lengths: Sequence[int]
    begun: float = field(default_factory=time.monotonic)
    done: int = 0

    def chunk(self, report: ChunkReport) -> AdaptChunk:
        """One chunk, as it happens."""
        self.done += report.end - report.start
        return AdaptChunk(
            path=self.paths[report.document],
            progress=(self.done, sum(self.lengths)),
            **dict(Chunk.of(report, in_documents=True)),
        )

    def summary(self, report: TTTReport) -> AdaptReport:
        """All of it."""
        before, after = _mean_losses(report.chunks)
        by_document: list[list[ChunkReport]] = [[] for _ in self.paths]
        for chunk in report.chunks:
            by_document[chunk.document].append(chunk)
        return AdaptReport.model_validate(
            report_fields(report, in_documents=True)
            | {
                "tokens": sum(self.lengths),
                "actions": Counter(chunk.action.name for chunk in report.chunks),
                "loss_before": before,
                "loss_after": after,
                "seconds": time.monotonic() - self.begun,
                "documents": [
                    self._document(index, chunks) for index, chunks in enumerate(by_document)
                ],
            }
        )

    def _document(self, index: int, chunks: Sequence[ChunkReport]) -> DocumentReport:
        before, after = _mean_losses(chunks)
        return DocumentReport(
            path=self.paths[index],
            tokens=self.lengths[index],
            chunks=len(chunks),
            loss_before=before,
            loss_after=after,
        )


async def teach(lesson: Lesson, events: Events) -> AdaptReport:
    """The report, once all is learned. Closes the events in any case."""
    try:
        async with aclosing(events.listen()) as heard:
            async for _, event in heard:
                if isinstance(event, DoneEvent) and event.ttt is not None:
                    return lesson.summary(event.ttt)
    finally:
        await events.aclose()
    raise RuntimeError("an adapt request ended without a report")


async def stream_lesson(lesson: Lesson, events: Events) -> AsyncGenerator[dict[str, Any], None]:
    """Every chunk as it happens, then the report."""
    async with aclosing(events.listen()) as heard:
        async for _, event in heard:
            if isinstance(event, ChunkEvent):
                yield lesson.chunk(event.report).model_dump(mode="json")
            elif isinstance(event, DoneEvent) and event.ttt is not None:
                yield lesson.summary(event.ttt).model_dump(mode="json")


def _mean_losses(chunks: Iterable[ChunkReport]) -> tuple[float | None, float | None]:
    """Mean losses over the chunks' tokens, before and after, in nats."""
    tokens, before, after = 0, 0.0, 0.0
    for chunk in chunks:
        if chunk.loss_before is None or not math.isfinite(chunk.loss_before):
            continue
        kept = chunk.loss_after if chunk.rollback is None else None
        count = chunk.end - chunk.start
        tokens += count
        before += count * chunk.loss_before
        after += count * (chunk.loss_before if kept is None else kept)
    return (before / tokens, after / tokens) if tokens else (None, None)
