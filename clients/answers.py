"""What an OpenAI-compatible endpoint answers, typed and checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clients import shapes
from clients.wire import AnswerError

Raw = dict[str, Any]

# Also those that JSON can't hold, which some servers send.
_number = shapes.scalar("a number", lambda value: type(value) in (int, float))
_numbers = shapes.each(shapes.or_null(_number))
_USAGE = shapes.fields(
    {}, dict.fromkeys(("prompt_tokens", "completion_tokens"), shapes.or_null(_number))
)
_LOGPROBS = shapes.fields(
    {
        "tokens": shapes.each(shapes.text),
        "token_logprobs": _numbers,
        "text_offset": shapes.each(shapes.count),
    }
)
#: What is read of `ttt`, once the numbers that JSON can't hold are null.
LEARNED = shapes.fields(
    {
        "gate": shapes.text,
        "chunk_size": shapes.count,
        "cost": shapes.fields(
            {
                "chunks": shapes.or_null(shapes.count),
                **dict.fromkeys(("nominal", "measured", "seconds"), shapes.or_null(shapes.number)),
            }
        ),
        "chunks": shapes.each(shapes.fields({"action": shapes.text, "reason": shapes.text})),
    },
    # Servers of earlier versions have none.
    {"choice": shapes.or_null(shapes.fields({"read": shapes.text}))},
)


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
        cached_tokens: of the prompt, read before; None where the server doesn't tell.
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
    cached_tokens: int | None
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
    rest = (prompt_tokens, completion_tokens, _cached(raw), _ttt(raw), raw, seconds)
    found = _objects(raw, "choices")
    if not found:
        yield CompletionChunk(None, "", None, None, *rest)
    for each in found:
        choice = _choice(each, "delta")
        index = _checked("index", each.get("index", 0), shapes.count)
        yield CompletionChunk(index, choice.text, choice.finish_reason, choice.logprobs, *rest)


def model_names(raw: Raw) -> list[str]:
    """From the answer of `/v1/models`."""
    return [field_of(each, "id", str) for each in _objects(raw, "data")]


def model_context(raw: Raw, model: str | None) -> int | None:
    """Longest context of a model (default: the first) in the answer of `/v1/models`, in tokens.

    None where the server doesn't say, or has no such model.
    """
    length = _card(raw, model).get("max_model_len")
    return length if isinstance(length, int) and length > 0 else None


def server_settings(raw: Raw, model: str | None) -> dict[str, Any]:
    """How a model's server learns (default: the first's), from the answer of `/v1/models`.

    Flat, as `server.gate` and `server.rule.learning_rate`; empty of servers that don't learn.
    """
    ttt = _card(raw, model).get("ttt")
    return dict(_flat("server", ttt)) if isinstance(ttt, Mapping) else {}


def _card(raw: Raw, model: str | None) -> Raw:
    """What `/v1/models` says of a model (default: the first); empty where there is no such."""
    cards = _objects(raw, "data")
    return next((each for each in cards if model is None or each.get("id") == model), {})


def _flat(name: str, value: object) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, each in value.items():
        yield from _flat(f"{name}.{key}", each)


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
    reason = _checked("finish_reason", raw.get("finish_reason"), shapes.or_null(shapes.text))
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
        values = _checked("logprob", [each.get("logprob") for each in content], _numbers)
        offsets = [0]
        for token in tokens:
            offsets.append(offsets[-1] + len(token))
        return Logprobs(tuple(tokens), tuple(values), tuple(offsets[:-1]))
    _checked("logprobs", raw, _LOGPROBS)
    return Logprobs(tuple(raw["tokens"]), tuple(raw["token_logprobs"]), tuple(raw["text_offset"]))


def _usage(raw: Raw) -> tuple[int | None, int | None]:
    usage = _checked("usage", raw.get("usage"), shapes.or_null(_USAGE))
    if usage is None:
        return None, None
    return _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))


def _count(value: float | None) -> int | None:
    """A number of tokens; None where it is one that counts nothing, as -1 or infinity."""
    # A completion of no tokens is null or missing on some servers.
    value = value or 0
    return int(value) if value >= 0 and math.isfinite(value) else None


def _cached(raw: Raw) -> int | None:
    usage = raw.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, Mapping) else None
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    return cached if shapes.is_count(cached) else None


def _ttt(raw: Raw) -> dict[str, Any] | None:
    return _checked("ttt", shapes.finite(raw.get("ttt")), shapes.or_null(LEARNED))


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


def _checked(name: str, value: Any, check: shapes.Check) -> Any:
    """A value that is what it should be.

    Raises:
        AnswerError: it isn't.
    """
    wrong = shapes.fault(name, value, check)
    if wrong is not None:
        raise AnswerError(
            200,
            f"the answer's {wrong}; is --base-url that of an OpenAI-compatible endpoint?",
        )
    return value


def _lacks(name: str, raw: object) -> AnswerError:
    there = ", ".join(map(str, raw)) if isinstance(raw, Mapping) else type(raw).__name__
    return AnswerError(
        200,
        f"the answer has no usable field {name!r} (there is: {there or 'nothing'}); is --base-url "
        "that of an OpenAI-compatible endpoint?",
    )
