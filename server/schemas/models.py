"""`/v1/models`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ponderttt.adaptation.actions import CostModelName
from ponderttt.adaptation.params import AdaptOn, GateName, Read, When
from ponderttt.adaptation.rules import UpdateRule
from ponderttt.fast_weights.layout import LoRAConfig
from server.schemas.base import ResponseModel
from server.settings import ActionName


class ServedTTT(ResponseModel):
    """What decides how this server learns; whoever compares its answers with others keeps it."""

    gate: GateName = Field(
        description="This and the next seven hold where neither request nor session says."
    )
    action: ActionName = Field(description="Of gate `fixed`.")
    budget: float = Field(description="Of all gates but `fixed`.")
    cost_model: CostModelName
    chunk_size: int
    adapt_on: AdaptOn
    when: When
    read: Read
    lora: LoRAConfig = Field(
        description="Shape of the fast weights: `layers` top blocks, and in them `targets`."
    )
    rule: UpdateRule = Field(description="What a gradient step is.")
    policy: str | None = Field(description="SHA-256 of the trained gate; null without one.")
    measure_costs: bool = Field(description="Whether costs were timed here, not estimated.")
    engine: Literal["torch", "vllm"] = Field(description="What generates.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="Of the base model.")


class ModelObject(ResponseModel):
    """The base model; sessions adapt it without changing it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ponderttt"
    max_model_len: int
    ttt: ServedTTT


class ModelList(ResponseModel):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelObject]
