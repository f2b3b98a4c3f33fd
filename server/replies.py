"""What the two completion APIs say, piece by piece and as a whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ponderttt.engine.outputs import FinishReason, PromptEvent, TokenEvent, TTTReport
from ponderttt.engine.request import new_request_id
from ponderttt.engine.sampler import SampledToken
from ponderttt.models.tokenizer import Tokenizer
from server.logprobs import chat_logprobs, completion_logprobs, prompt_offsets
from server.prompts import Prompt
from server.schemas.base import ResponseModel
from server.schemas.chat import ChatAnswer, ChatChoice, ChatResponse
from server.schemas.completion import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    Usage,
)
from server.schemas.ttt import TTTResult


@dataclass(slots=True)
class ChoiceText:
    """One choice as far as it has come."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[SampledToken] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    reason: FinishReason | None = None

    def add(self, event: TokenEvent) -> None:
        """Append new tokens."""
        self.text += event.text
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        self.offsets += event.offsets


@dataclass(slots=True)
class Outcome:
    """All that came of the requests of one call.

    Args:
        choices: by prompt, then by sequence.
        scored: log-probabilities of the prompts, where they were asked for.
        reports: of test-time training, by prompt.
    """

    choices: list[list[ChoiceText]]
    scored: list[PromptEvent | None]
    reports: list[TTTReport | None]
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0

    @classmethod
    def empty(cls, prompts: int, n: int) -> Outcome:
        """Nothing yet."""
        choices = [[ChoiceText() for _ in range(n)] for _ in range(prompts)]
        return cls(choices, [None] * prompts, [None] * prompts)

    @property
    def usage(self) -> Usage:
        """Tokens counted."""
        return Usage.of(self.prompt_tokens, self.generated_tokens, self.cached_tokens)

    @property
    def ttt(self) -> TTTResult | list[TTTResult | None] | None:
        """The report; of several prompts a list."""
        results = [TTTResult.of(r) if r is not None else None for r in self.reports]
        return results[0] if len(results) == 1 else results


@dataclass(frozen=True, slots=True)
class Head:
    """What all objects of one answer begin with."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str) -> Head:
        """With a fresh id."""
        return cls(f"{prefix}-{new_request_id()}", int(time.time()), model)


class Reply(Protocol):
    """The form of one API's answers; `prompt` is the index of a prompt."""

    @property
    def head(self) -> Head:
        """What its objects begin with."""

    @property
    def stream_object(self) -> str:
        """Name of a streamed object."""

    def opening(self, prompt: int, scored: PromptEvent | None) -> dict[str, Any] | None:
        """What a streamed choice begins with."""

    def piece(self, prompt: int, event: TokenEvent) -> dict[str, Any]:
        """New tokens of a streamed choice."""

    def ending(self, reason: FinishReason) -> dict[str, Any]:
        """The end of a streamed choice."""

    def whole(self, outcome: Outcome) -> ResponseModel:
        """The answer in one piece."""


@dataclass(frozen=True, slots=True)
class CompletionReply:
    """`/v1/completions`.

    Args:
        head: of the answer.
        tokenizer: spells tokens.
        prompts: in order.
        echo: begin each text with its prompt.
        logprobs: report log-probabilities.
    """

    head: Head
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    echo: bool
    logprobs: bool
    stream_object: str = "text_completion"

    def opening(self, prompt: int, scored: PromptEvent | None) -> dict[str, Any] | None:
        """The echoed prompt."""
        if not self.echo:
            return None
        text = self._prompt_text(prompt)
        logprobs = self._logprobs(prompt, scored, ChoiceText())
        return {"text": text, "logprobs": _dump(logprobs), "finish_reason": None}

    def piece(self, prompt: int, event: TokenEvent) -> dict[str, Any]:
        """Text and its tokens."""
        choice = ChoiceText()
        choice.add(event)
        logprobs = self._logprobs(prompt, None, choice)
        return {"text": event.text, "logprobs": _dump(logprobs), "finish_reason": None}

    def ending(self, reason: FinishReason) -> dict[str, Any]:
        """No more text."""
        return {"text": "", "logprobs": None, "finish_reason": reason}

    def whole(self, outcome: Outcome) -> CompletionResponse:
        """All choices, those of the first prompt first."""
        flat = [
            (prompt, choice) for prompt, group in enumerate(outcome.choices) for choice in group
        ]
        return CompletionResponse(
            id=self.head.id,
            created=self.head.created,
            model=self.head.model,
            choices=[
                CompletionChoice(
                    index=index,
                    text=(self._prompt_text(prompt) if self.echo else "") + choice.text,
                    logprobs=self._logprobs(prompt, outcome.scored[prompt], choice),
                    finish_reason=choice.reason or "length",
                )
                for index, (prompt, choice) in enumerate(flat)
            ],
            usage=outcome.usage,
            ttt=outcome.ttt,
        )

    def _prompt_text(self, prompt: int) -> str:
        given = self.prompts[prompt]
        return self.tokenizer.decode(given.ids) if given.text is None else given.text

    def _logprobs(
        self, prompt: int, scored: PromptEvent | None, choice: ChoiceText
    ) -> CompletionLogprobs | None:
        if not self.logprobs:
            return None
        text = self._prompt_text(prompt) if self.echo else ""
        ids: list[int] = []
        logprobs: list[SampledToken | None] = []
        offsets: list[int] = []
        if self.echo and scored is not None:
            ids += scored.token_ids
            logprobs += scored.logprobs
            offsets += prompt_offsets(self.tokenizer, scored.token_ids, text)
        ids += choice.token_ids
        logprobs += choice.logprobs
        offsets += [len(text) + offset for offset in choice.offsets]
        return completion_logprobs(self.tokenizer, ids, logprobs, offsets)


@dataclass(frozen=True, slots=True)
class ChatReply:
    """`/v1/chat/completions`.

    Args:
        head: of the answer.
        tokenizer: spells tokens.
        logprobs: report log-probabilities.
    """

    head: Head
    tokenizer: Tokenizer
    logprobs: bool
    stream_object: str = "chat.completion.chunk"

    def opening(self, prompt: int, scored: PromptEvent | None) -> dict[str, Any] | None:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, prompt: int, event: TokenEvent) -> dict[str, Any]:
        """Text and its tokens."""
        logprobs = chat_logprobs(self.tokenizer, event.logprobs) if self.logprobs else None
        return {
            "delta": {"content": event.text},
            "logprobs": _dump(logprobs),
            "finish_reason": None,
        }

    def ending(self, reason: FinishReason) -> dict[str, Any]:
        """No more text."""
        return {"delta": {}, "logprobs": None, "finish_reason": reason}

    def whole(self, outcome: Outcome) -> ChatResponse:
        """All choices."""
        (report,) = outcome.reports
        return ChatResponse(
            id=self.head.id,
            created=self.head.created,
            model=self.head.model,
            choices=[
                ChatChoice(
                    index=index,
                    message=ChatAnswer(content=choice.text),
                    logprobs=chat_logprobs(self.tokenizer, choice.logprobs)
                    if self.logprobs
                    else None,
                    finish_reason=choice.reason or "length",
                )
                for index, choice in enumerate(outcome.choices[0])
            ],
            usage=outcome.usage,
            ttt=TTTResult.of(report) if report is not None else None,
        )


def _dump(model: ResponseModel | None) -> dict[str, Any] | None:
    return model.model_dump(mode="json") if model is not None else None
