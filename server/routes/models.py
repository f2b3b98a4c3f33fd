"""`GET /v1/models`."""

from __future__ import annotations

from fastapi import APIRouter

from server.context import Context, ContextDep
from server.routes.common import ERRORS
from server.schemas.models import ModelList, ModelObject

router = APIRouter(tags=["models"], responses=ERRORS)


@router.get("/v1/models")
async def list_models(context: ContextDep) -> ModelList:
    """The base model; sessions adapt it without changing it."""
    return ModelList(data=[_served(context)])


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, context: ContextDep) -> ModelObject:
    """The base model by its name."""
    context.check_model(model)
    return _served(context)


def _served(context: Context) -> ModelObject:
    core = context.engine.core
    return ModelObject(
        id=core.model_name, created=context.started, max_model_len=core.max_model_len
    )
