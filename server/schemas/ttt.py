"""The `ttt` extension: how a request learns, and what it learned."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, Literal

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from ponderttt.adaptation.actions import Action, CostModelName
from ponderttt.adaptation.params import (
    MAX_BUDGET,
    MAX_CHUNK,
    MIN_BUDGET,
    MIN_CHUNK,
    AdaptOn,
    GateName,
    Read,
    TTTParams,
    When,
)
from ponderttt.engine.outputs import (
    Choice,
    ChunkReport,
    CostSummary,
    Phase,
    ReadWeights,
    Reason,
    TTTReport,
)
from server.schemas.base import RequestModel, ResponseModel
from server.settings import ActionName

_PARAMS = tuple(field.name for field in fields(TTTParams))


class LearningOptions(RequestModel):
    """How to learn; what is left out is the session's, else the server's default."""

    gate: GateName | None = Field(None, description="Who decides how hard to ponder each chunk.")
    action: ActionName | None = Field(
        None, description="Action of gate `fixed`; naming one asks for that gate."
    )
    budget: float | None = Field(
        None,
        ge=MIN_BUDGET,
        le=MAX_BUDGET,
        description="Highest mean cost per chunk, in multiples of its forward; 1 never learns.",
    )
    cost_model: CostModelName | None = Field(
        None, description="Costs in which the budget is counted."
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="Seed of gate `random`.")
    chunk_size: int | None = Field(
        None, ge=MIN_CHUNK, le=MAX_CHUNK, description="Tokens per chunk."
    )

    def params(self, session: str | None) -> TTTParams:
        """The engine's parameters.

        Raises:
            InvalidRequestError: fields that contradict each other, named `ttt.<field>`.
        """
        given = {name: getattr(self, name) for name in _PARAMS if name in type(self).model_fields}
        action = Action[self.action] if self.action is not None else None
        return TTTParams(**given | {"session": session, "action": action})


class SessionOptions(LearningOptions):
    """Learning options that concern completions, too."""

    adapt_on: AdaptOn | None = Field(
        None, description="Learn the prompt, the generated text, or both."
    )
    when: When | None = Field(
        None,
        description="`inline` learns each chunk before reading on; `background` answers first "
        "and learns in idle time (sessions only).",
    )
    read: Read | None = Field(
        None,
        description="Whose weights answer: `auto` the session's where they predict the prompt "
        "clearly better than the base model's do, else those; `session` always the session's, as "
        "where nothing is generated (`max_tokens` 0), and with the engine `vllm`.",
    )


class TTTOptions(SessionOptions):
    """Test-time training of one completion."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"session": "my-repo", "budget": 2.0}]}
    )

    session: str | None = Field(
        None,
        description="Whose fast weights to use; without one they live for this request only.",
    )


class Cost(ResponseModel):
    """Cost of a request's chunks."""

    nominal: float = Field(description="Mean per chunk, × forward, as published.")
    measured: float = Field(description="Mean per chunk, × forward, as measured on this machine.")
    seconds: float = Field(description="Wall time of all chunks, read and write.")
    chunks: int

    @classmethod
    def of(cls, cost: CostSummary) -> Cost:
        """From the engine's summary."""
        return cls(
            nominal=cost.nominal,
            measured=cost.measured,
            seconds=cost.seconds,
            chunks=cost.chunks,
        )


class Chunk(ResponseModel):
    """What was decided about one chunk, and what came of it."""

    index: int
    phase: Phase
    tokens: tuple[int, int] = Field(description="First token, and the one after the last.")
    action: ActionName
    reason: Reason = Field(description="The gate that decided, or what overrode it.")
    loss_before: float | None = Field(description="Nats per token, as the chunk was read.")
    loss_after: float | None = Field(description="After the update; null where there was none.")
    cost: float = Field(description="× forward, in the request's cost model.")
    nominal: float
    measured: float
    seconds: float
    document: int | None = Field(None, description="Adapt requests only: index of the document.")
    rollback: str | None = Field(
        None, description="Only where an update was rolled back: why (not_finite, norm, loss)."
    )

    @model_serializer(mode="wrap")
    def _leave_out(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return {
            name: value
            for name, value in values.items()
            if value is not None or name not in ("document", "rollback")
        }

    @classmethod
    def of(cls, report: ChunkReport, *, in_documents: bool = False) -> Chunk:
        """From the engine's report."""
        name: ActionName = report.action.name  # type: ignore[assignment]  # an enum's name is str
        return cls(
            index=report.index,
            phase=report.phase,
            tokens=(report.start, report.end),
            action=name,
            reason=report.reason,
            loss_before=_finite(report.loss_before),
            loss_after=_finite(report.loss_after),
            cost=report.cost,
            nominal=report.nominal,
            measured=report.measured,
            seconds=report.seconds,
            document=report.document if in_documents else None,
            rollback=report.rollback,
        )


def _finite(loss: float | None) -> float | None:
    """JSON has no NaN and no infinity; an update that gave one was rolled back."""
    return loss if loss is not None and math.isfinite(loss) else None


class PromptChoice(ResponseModel):
    """Whose weights answered, where that was left to the prompt."""

    read: ReadWeights
    session: float | None = Field(description="Loss of the prompt by these weights, nats/token.")
    base: float | None = Field(description="The same by the base model's.")
    error: float | None = Field(
        description="Standard error of their difference; the session answers where its loss is "
        "lower by 1.645 times as much."
    )
    tokens: int = Field(description="Of the prompt, that were compared.")

    @classmethod
    def of(cls, choice: Choice | None) -> PromptChoice | None:
        """From the engine's report."""
        if choice is None:
            return None
        return cls(
            read=choice.read,
            session=_finite(choice.session),
            base=_finite(choice.base),
            error=_finite(choice.error),
            tokens=choice.tokens,
        )


class TTTResult(ResponseModel):
    """What test-time training did for one request."""

    session: str | None
    version_before: int
    version_after: int
    digest: str = Field(description="SHA-256 of the fast weights that the request began with.")
    gate: GateName
    budget: float | None
    cost_model: CostModelName
    chunk_size: int
    when: Literal["inline", "background"]
    pending: int = Field(description="Chunks left to learn in the background.")
    choice: PromptChoice | None = Field(
        None, description="Null where nothing was compared: the session's weights answered."
    )
    cost: Cost
    chunks: list[Chunk]

    @classmethod
    def of(cls, report: TTTReport) -> TTTResult:
        """From the engine's report."""
        return cls(choice=PromptChoice.of(report.choice), **report_fields(report))


def report_fields(report: TTTReport, *, in_documents: bool = False) -> dict[str, Any]:
    """The fields that completions and adapt requests report alike."""
    return {
        "session": report.session,
        "version_before": report.version_before,
        "version_after": report.version_after,
        "digest": report.digest,
        "gate": report.gate,
        "budget": report.budget,
        "cost_model": report.cost_model,
        "chunk_size": report.chunk_size,
        "when": report.when,
        "pending": report.pending,
        "cost": Cost.of(report.cost),
        "chunks": [Chunk.of(chunk, in_documents=in_documents) for chunk in report.chunks],
    }
