"""Fields that both completion calls have."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field

from ponderttt.engine.sampling_params import MAX_N, SamplingParams
from ponderttt.errors import InvalidRequestError
from server.schemas.base import RequestModel, forms, ignored, items
from server.schemas.ttt import TTTOptions

_TOKEN_ID = re.compile("[0-9]{1,9}")


class StreamOptions(RequestModel):
    """What a stream holds besides the text."""

    include_usage: bool | None = Field(None, description="End with an event that counts tokens.")
    include_obfuscation: Any = ignored()


class SamplingFields(RequestModel):
    """How tokens are drawn; null means the default."""

    model: str | None = Field(None, description="The served model, which is also the default.")
    max_tokens: int | None = Field(None, ge=0, description="New tokens at most.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; default 1.")
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus mass; default 1.")
    top_k: int | None = Field(None, ge=-1, description="Tokens kept; 0 or -1 (default) keep all.")
    min_p: float | None = Field(
        None, ge=0, le=1, description="Least probability relative to the best token; default 0."
    )
    n: int | None = Field(None, ge=1, le=MAX_N, description="Choices per prompt; default 1.")
    stop: Annotated[
        str | Annotated[list[str], items()] | None, forms("a string or a list of strings")
    ] = Field(None, description="Strings that end the text; they are left out of it.")
    stop_token_ids: Annotated[list[int], items(max_length=128)] | None = Field(
        None, description="Tokens that end the text."
    )
    ignore_eos: bool | None = Field(None, description="Go on after an end-of-text token.")
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="The same seed gives the same text."
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="1 is none.")
    logit_bias: dict[str, float] | None = Field(
        None, description="Added to the logits of these token ids, each in [-100, 100]."
    )
    stream: bool | None = Field(None, description="Send the text as it is generated (SSE).")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    ttt: TTTOptions | None = Field(None, description="Test-time training.")

    user: Any = ignored()
    store: Any = ignored()
    metadata: Any = ignored()
    service_tier: Any = ignored()
    safety_identifier: Any = ignored()
    prompt_cache_key: Any = ignored()
    prompt_cache_retention: Any = ignored()
    prompt_cache_options: Any = ignored()

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with an event that counts tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(
        self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """The engine's parameters.

        Raises:
            InvalidRequestError: a value is out of range, or `stream_options` without `stream`.
        """
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options", "only a stream has options; set stream")
        given: dict[str, Any] = {
            name: value
            for name in (
                "temperature", "top_p", "min_p", "n", "seed", "ignore_eos",
                "presence_penalty", "frequency_penalty", "repetition_penalty",
            )
            if (value := getattr(self, name)) is not None
        }  # fmt: skip
        return SamplingParams(
            max_tokens=max_tokens,
            top_k=max(self.top_k or 0, 0),
            stop=_stops(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=_biases(self.logit_bias or {}),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **given,
        )


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _biases(given: dict[str, float]) -> dict[int, float]:
    for key in given:
        if not _TOKEN_ID.fullmatch(key):
            raise InvalidRequestError("logit_bias", f"{key[:40]!r} is not a token id")
    return {int(key): bias for key, bias in given.items()}
