"""`/v1/models`."""

from __future__ import annotations

from typing import Literal

from server.schemas.base import ResponseModel


class ModelObject(ResponseModel):
    """The base model; sessions adapt it without changing it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ponderttt"
    max_model_len: int


class ModelList(ResponseModel):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelObject]
