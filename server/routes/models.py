"""`GET /v1/models`."""

from __future__ import annotations

from dataclasses import asdict, replace

from fastapi import APIRouter

from server.context import Context, ContextDep
from server.routes.common import ERRORS
from server.schemas.models import ModelList, ModelObject, ServedTTT

router = APIRouter(tags=["models"], responses=ERRORS)


@router.get("/v1/models")
async def list_models(context: ContextDep) -> ModelList:
    """The base model, and how this server learns; sessions adapt it without changing it."""
    return ModelList(data=[_served(context)])


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, context: ContextDep) -> ModelObject:
    """The base model by its name."""
    context.check_model(model)
    return _served(context)


def _served(context: Context) -> ModelObject:
    core = context.engine.core
    return ModelObject(
        id=core.model_name,
        created=context.started,
        max_model_len=core.max_model_len,
        ttt=_ttt(context),
    )


def _ttt(context: Context) -> ServedTTT:
    core, settings = context.engine.core, context.settings
    defaults, layout = core.config.ttt, core.bank.layout
    targets = dict.fromkeys(entry.module.rsplit(".", 1)[-1] for entry in layout.entries)
    layers = layout.last_layer - layout.first_layer
    return ServedTTT.model_validate(
        asdict(defaults)
        | {
            "gate": core.default_gate,
            "action": defaults.action.name,
            # Where vLLM generates, the session always answers.
            "read": "session" if settings.engine == "vllm" else defaults.read,
            "lora": replace(layout.config, layers=layers, targets=tuple(targets)),
            "rule": core.writer.rule,
            "policy": core.policy.digest if core.policy is not None else None,
            "measure_costs": core.config.measure_costs,
            "engine": settings.engine,
            "dtype": settings.dtype,
        }
    )
