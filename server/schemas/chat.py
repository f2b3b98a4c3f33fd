"""`/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from ponderttt.engine.sampling_params import MAX_LOGPROBS
from ponderttt.errors import InvalidRequestError
from server.schemas.base import RequestModel, ResponseModel, forms, ignored, items
from server.schemas.completion import Usage
from server.schemas.sampling import SamplingFields
from server.schemas.ttt import TTTResult

#: Turns of one chat.
MAX_MESSAGES = 4096


class TextPart(RequestModel):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(RequestModel):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | Annotated[list[TextPart], items()],
        forms('a string or a list of {"type": "text", "text": …}'),
    ]
    name: str | None = None
    tool_call_id: Any = ignored()
    refusal: Any = ignored()
    annotations: Any = ignored()
    audio: Any = ignored()
    function_call: Any = ignored()
    tool_calls: Any = ignored()

    def for_template(self) -> dict[str, str]:
        """As chat templates expect it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        # The newer name of the same role; templates know the older one.
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": text}
        return message if self.name is None else message | {"name": self.name}


class ChatRequest(SamplingFields):
    """Answer a chat, written out by the model's chat template."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "messages": [{"role": "user", "content": "Reverse a list in Python."}],
                    "max_tokens": 64,
                    "temperature": 0,
                }
            ]
        }
    )

    messages: Annotated[list[Message], items(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = Field(
        None, ge=0, description="New tokens at most; the newer name of `max_tokens`."
    )
    logprobs: bool | None = Field(None, description="Report the tokens' log-probabilities.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Likeliest alternatives per token."
    )
    response_format: Any = Field(None, description='Only {"type": "text"}.')
    tools: Any = Field(None, description="Not supported; null or empty.")
    functions: Any = Field(None, description="Not supported; null or empty.")
    tool_choice: Any = ignored()
    parallel_tool_calls: Any = ignored()
    reasoning_effort: Any = ignored()
    verbosity: Any = ignored()
    modalities: Any = ignored()

    @property
    def new_tokens(self) -> int | None:
        """The limit that was given, under either name."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    def check_supported(self) -> None:
        """Raise InvalidRequestError for what would have to change the answer, but can't."""
        for name in ("tools", "functions"):
            if getattr(self, name):
                raise InvalidRequestError(name, "is not supported by this server; leave it out")
        if self.response_format not in (None, {"type": "text"}):
            raise InvalidRequestError("response_format", 'only {"type": "text"} is supported')
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs", "needs logprobs: true")


class TopLogprob(ResponseModel):
    """An alternative to a token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    """Log-probabilities in nats, token by token."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatAnswer(ResponseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(ResponseModel):
    """One answer."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "abort"]


class ChatResponse(ResponseModel):
    """The answer; a stream sends `chat.completion.chunk` objects, with `ttt` in the last."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    ttt: TTTResult | None = Field(description="What was learned.")
