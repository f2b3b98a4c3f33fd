"""`/tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from server.schemas.base import RequestModel, ResponseModel, items
from server.schemas.chat import MAX_MESSAGES, Message


class TokenizeRequest(RequestModel):
    """A text or a chat, of which exactly one is given."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "def f(x):"}]})

    model: str | None = Field(None, description="The served model, which is also the default.")
    prompt: str | None = None
    messages: Annotated[list[Message], items(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = Field(
        True, description="Put the opening token before a text; a chat's template does so itself."
    )
    add_generation_prompt: bool = Field(True, description="Open the answer at the end of a chat.")
    return_token_strs: bool | None = Field(None, description="Give the tokens' texts, too.")


class TokenizeResponse(ResponseModel):
    """Token ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestModel):
    """Token ids."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [1, 2, 3]}]})

    model: str | None = Field(None, description="The served model, which is also the default.")
    tokens: Annotated[list[int], items()]


class DetokenizeResponse(ResponseModel):
    """Their text."""

    prompt: str
