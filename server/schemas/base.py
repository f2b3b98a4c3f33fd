"""Common ground of all request models: strict types, no unknown fields, plain error messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError


class RequestModel(BaseModel):
    """A request or a part of one: JSON types as they are (no "16" for 16), finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class ResponseModel(BaseModel):
    """An answer or a part of one."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())


def forms(description: str) -> WrapValidator:
    """One message for a field that takes several forms, instead of one for each form."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise PydanticCustomError("forms", "{hint}", {"hint": f"give {description}"}) from error

    return WrapValidator(check)


def items(**limits: Any) -> Any:
    """A list whose first wrong item is the only one reported: errors take far longer than items."""
    return Field(fail_fast=True, **limits)


def ignored() -> Any:
    """A field that OpenAI's clients send and that changes nothing here."""
    return Field(None, description="Accepted and ignored.")
