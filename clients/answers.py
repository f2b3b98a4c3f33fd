"""What an OpenAI-compatible endpoint answers, typed and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clients.wire import AnswerError

Raw = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities in nats, token by token; None for a first token, which nothing predicts.

    Args:
        tokens: their texts.
        token_logprobs: of them.
        text_offset: where in the choice's text each begins, in characters.
    """

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    text_offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One continuation.

    Args:
        text: with the prompt before it, where `echo` asked for it.
        finish_reason: `stop`, `length`, …; None while a stream goes on.
        logprobs: where they were asked for.
    """

    text: str
    finish_reason: str | None
    logprobs: Logprobs | None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer.

    Args:
        choices: of the first prompt first.
        prompt_tokens: read; 0 where the server doesn't count.
        completion_tokens: generated, in all choices; 0 where the server doesn't count.
        ttt: what was learned; None of servers that don't learn.
        raw: the answer as it came.
        seconds: from sending the request to the last byte, without waits before it was accepted.
    """

    choices: tuple[Choice, ...]
    prompt_tokens: int
    completion_tokens: int
    ttt: dict[str, Any] | None
    raw: dict[str, Any]
    seconds: float

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True)
class CompletionChunk:
    """A piece of a streamed answer.

    Args:
        index: of the choice; None of an event that only accounts for the request.
        text: new.
        finish_reason: why the choice has ended; None while it goes on.
        logprobs: of the new tokens.
        prompt_tokens, completion_tokens: in the last piece, where the server counts; else None.
        ttt: what was learned, in the last piece; None of servers that don't learn.
        raw: the event as it came.
        seconds: since the request was sent.
    """

    index: int | None
    text: str
    finish_reason: str | None
    logprobs: Logprobs | None
    prompt_tokens: int | None
    completion_tokens: int | None
    ttt: dict[str, Any] | None
    raw: dict[str, Any]
    seconds: float


def completion(raw: Raw, seconds: float) -> Completion:
    """From the answer to a completion or chat request.

    Raises:
        AnswerError: a field is missing or of another type.
    """
    choices = tuple(_choice(each, "message") for each in _objects(raw, "choices"))
    if not choices:
        raise _lacks("choices", raw)
    prompt_tokens, completion_tokens = _usage(raw)
    return Completion(choices, prompt_tokens or 0, completion_tokens or 0, _ttt(raw), raw, seconds)


def chunks(raw: Raw, seconds: float) -> Iterator[CompletionChunk]:
    """From an event of a stream: one per choice, or one without a choice.

    Raises:
        AnswerError: a field is missing or of another type.
    """
    prompt_tokens, completion_tokens = _usage(raw)
    rest = (prompt_tokens, completion_tokens, _ttt(raw), raw, seconds)
    found = _objects(raw, "choices")
    if not found:
        yield CompletionChunk(None, "", None, None, *rest)
    for each in found:
        choice = _choice(each, "delta")
        index = each.get("index", 0)
        yield CompletionChunk(index, choice.text, choice.finish_reason, choice.logprobs, *rest)


def model_names(raw: Raw) -> list[str]:
    """From the answer of `/v1/models`."""
    return [field_of(each, "id", str) for each in _objects(raw, "data")]


def model_context(raw: Raw, model: str | None) -> int | None:
    """Longest context of a model (default: the first) in the answer of `/v1/models`, in tokens.

    None where the server doesn't say, or has no such model.
    """
    for each in _objects(raw, "data"):
        if model is None or each.get("id") == model:
            length = each.get("max_model_len")
            return length if isinstance(length, int) and length > 0 else None
    return None


def token_ids(raw: Raw) -> list[int]:
    """From the answer of `/tokenize`."""
    return list(field_of(raw, "tokens", list))


def objects(raw: Raw) -> list[Raw]:
    """The list in an answer that is one."""
    return list(_objects(raw, "data"))


#: Where servers say what they are: a path, and how to read its answer.
VERSION_PATHS: tuple[tuple[str, Callable[[Raw], str | None]], ...] = (
    # vLLM
    ("/version", lambda raw: f"vLLM {raw['version']}" if "version" in raw else None),
    # ours, and others that are built with FastAPI
    ("/openapi.json", lambda raw: _title(raw.get("info"))),
    # llama.cpp
    ("/props", lambda raw: f"llama.cpp {raw['build_info']}" if "build_info" in raw else None),
)


def _title(info: object) -> str | None:
    if not isinstance(info, Mapping) or "version" not in info:
        return None
    return f"{info.get('title', '')} {info['version']}".strip()


def _choice(raw: Raw, holder: str) -> Choice:
    """Of a completion (`text`) or of a chat (`message` or `delta`)."""
    reason = raw.get("finish_reason")
    chat = holder in raw
    text = _content(field_of(raw, holder, dict)) if chat else field_of(raw, "text", str)
    return Choice(text, reason, _logprobs(raw.get("logprobs")))


def _content(message: Raw) -> str:
    """The text of a message, which may be in parts."""
    content = message.get("content")
    # Null where the model only calls tools; left out of pieces that bring no text.
    if content is None or isinstance(content, str):
        return content or ""
    parts = _objects(message, "content")
    return "".join(field_of(each, "text", str) for each in parts if each.get("type") == "text")


def _logprobs(raw: object) -> Logprobs | None:
    if not isinstance(raw, Mapping):
        return None
    content = raw.get("content")
    if isinstance(content, Sequence):
        # The form of chats, which llama.cpp uses for completions, too.
        tokens = [field_of(each, "token", str) for each in content]
        values = [each.get("logprob") for each in content]
        offsets = [0]
        for token in tokens:
            offsets.append(offsets[-1] + len(token))
        return Logprobs(tuple(tokens), tuple(values), tuple(offsets[:-1]))
    return Logprobs(
        tuple(field_of(raw, "tokens", list)),
        tuple(field_of(raw, "token_logprobs", list)),
        tuple(field_of(raw, "text_offset", list)),
    )


def _usage(raw: Raw) -> tuple[int | None, int | None]:
    usage = raw.get("usage")
    if not isinstance(usage, Mapping):
        return None, None
    # A completion of no tokens is null or missing on some servers.
    return usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0


def _ttt(raw: Raw) -> dict[str, Any] | None:
    ttt = raw.get("ttt")
    return ttt if isinstance(ttt, dict) else None


def _objects(raw: Raw, name: str) -> list[Raw]:
    found = field_of(raw, name, list)
    if not all(isinstance(each, dict) for each in found):
        raise _lacks(name, raw)
    return found


def field_of(raw: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    """A field that must be there.

    Raises:
        AnswerError: it isn't, or is of another type.
    """
    value = raw.get(name) if isinstance(raw, Mapping) else None
    if not isinstance(value, kind):
        raise _lacks(name, raw)
    return value


def _lacks(name: str, raw: object) -> AnswerError:
    there = ", ".join(map(str, raw)) if isinstance(raw, Mapping) else type(raw).__name__
    return AnswerError(
        200,
        f"the answer has no usable field {name!r} (there is: {there or 'nothing'}); is --base-url "
        "that of an OpenAI-compatible endpoint?",
    )
