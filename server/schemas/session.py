"""`/v1/sessions`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from ponderttt.adaptation.actions import CostModelName
from ponderttt.adaptation.params import AdaptOn, GateName, Read, When
from server.schemas.base import RequestModel, ResponseModel, items
from server.schemas.ttt import (
    Chunk,
    LearningOptions,
    SessionOptions,
    TTTResult,
)
from server.settings import ActionName

MAX_DOCUMENTS = 10_000
_ID = "1 to 128 letters, digits, '.', '_' or '-'; without one the server makes it."


class CreateSession(SessionOptions):
    """A new session and how its requests learn where they don't say otherwise."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"id": "my-repo", "budget": 2.0}]})

    id: str | None = Field(None, description=_ID)


class ForkSession(RequestModel):
    """A copy of a session."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"id": "my-repo-experiment"}]})

    id: str | None = Field(None, description=_ID)


class RollbackSession(RequestModel):
    """The version to go back to."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"version": 12}]})

    version: int = Field(ge=0, le=2**53, description="One of the session's `kept_versions`.")


class Document(RequestModel):
    """A text to learn; as long as one likes, since it is learned chunk by chunk."""

    path: str | None = Field(None, description="What the report calls it.")
    text: str = Field(min_length=1)


class AdaptBody(LearningOptions):
    """Texts to teach a session, in order."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"documents": [{"path": "shapes.py", "text": "def area(radius):\n    ..."}]}
            ]
        }
    )

    documents: Annotated[list[Document], items(min_length=1, max_length=MAX_DOCUMENTS)]
    stream: bool | None = Field(None, description="Send an event per chunk (SSE).")


class ChunkCosts(ResponseModel):
    """What learning has cost a session: means per chunk (× forward), seconds in all."""

    nominal: float
    measured: float
    seconds: float


class SessionObject(ResponseModel):
    """A session and what has happened to it."""

    id: str
    object: Literal["session"] = "session"
    owner: str | None = Field(description="Id of the API key that it belongs to, if any.")
    created: int
    last_used: int
    version: int = Field(description="Of the fast weights; each committed update adds one.")
    gate: GateName
    action: ActionName | None = Field(description="Of gate `fixed`, else null.")
    budget: float | None
    cost_model: CostModelName
    chunk_size: int
    adapt_on: AdaptOn
    when: When
    read: Read
    chunks: int
    learned_tokens: int
    chunks_by_action: dict[ActionName, int]
    rollbacks: int
    cost: ChunkCosts
    kept_versions: list[int] = Field(
        description="Stored versions, for `/rollback`; the last one is what a crash would leave."
    )
    snapshots: list[int] = Field(description="Versions that are kept beyond the last few.")
    norm: float | None = Field(
        description="L2 distance of the fast weights from fresh ones; null in lists."
    )
    digest: str | None = Field(description="SHA-256 of the fast weights; null in lists.")


class SessionList(ResponseModel):
    """The caller's sessions, in the order of their creation."""

    object: Literal["list"] = "list"
    data: list[SessionObject]


class SessionDeleted(ResponseModel):
    """A session is gone."""

    id: str
    object: Literal["session.deleted"] = "session.deleted"
    deleted: Literal[True] = True


class DocumentReport(ResponseModel):
    """What became of one document. Losses are means over its tokens, in nats."""

    path: str | None
    tokens: int
    chunks: int
    loss_before: float | None = Field(description="As the chunks were read.")
    loss_after: float | None = Field(
        description="The same, but with the loss after the update for chunks that were learned."
    )


class AdaptReport(TTTResult):
    """What a session learned from some documents. Losses as in `documents`, over all of them."""

    object: Literal["session.adaptation"] = "session.adaptation"
    tokens: int
    actions: dict[ActionName, int] = Field(description="Chunks by action.")
    loss_before: float | None
    loss_after: float | None
    seconds: float = Field(description="Wall time of the request.")
    documents: list[DocumentReport]


class AdaptChunk(Chunk):
    """An event of a streamed adapt request."""

    object: Literal["session.adaptation.chunk"] = "session.adaptation.chunk"
    path: str | None
    progress: tuple[int, int] = Field(description="Tokens dealt with, and tokens in all.")
