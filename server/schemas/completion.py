"""`/v1/completions`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from ponderttt.engine.sampling_params import MAX_LOGPROBS
from server.schemas.base import ResponseModel, forms, items
from server.schemas.sampling import SamplingFields
from server.schemas.ttt import TTTResult

TokenIds = Annotated[list[int], items()]
PromptField = Annotated[
    str | Annotated[list[str], items()] | TokenIds | Annotated[list[TokenIds], items()],
    forms("a string, a list of strings, a list of token ids, or a list of lists of token ids"),
]


class CompletionRequest(SamplingFields):
    """Continue a text, or fill in between a text and its suffix."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "def fibonacci(n):", "max_tokens": 32, "temperature": 0},
                {
                    "prompt": "def area(radius):\n    return ",
                    "suffix": "\n\nprint(area(2))\n",
                    "max_tokens": 16,
                    "ttt": {"session": "my-repo", "budget": 2.0, "when": "background"},
                },
            ]
        }
    )

    prompt: PromptField = Field(
        description="What to continue; several prompts give n choices each."
    )
    suffix: str | None = Field(
        None, description="What follows the text to be filled in; models with tokens for it only."
    )
    echo: bool | None = Field(
        None, description="Begin the text with the prompt; with max_tokens 0, score the prompt."
    )
    best_of: int | None = Field(None, description="Accepted where it equals n.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Likeliest alternatives to report per token."
    )


class CompletionLogprobs(ResponseModel):
    """Log-probabilities in nats, token by token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Where in `text` each token begins, in characters.")


class CompletionChoice(ResponseModel):
    """One continuation; choice i · n + k is the k-th of prompt i."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "abort"]


class PromptTokensDetails(ResponseModel):
    """Of the prompts' tokens, those that the frozen part of the model had read before, for anybody.

    Where fast weights have changed since, the part that adapts is run over them all the same.
    """

    cached_tokens: int


class Usage(ResponseModel):
    """Tokens of all prompts and all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
        """With their sum."""
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        )


class CompletionResponse(ResponseModel):
    """The answer; a stream sends objects of the same form, with `ttt` in the last."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    ttt: TTTResult | list[TTTResult | None] | None = Field(
        description="What was learned; for several prompts a list, one per prompt."
    )
