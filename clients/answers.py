"""What an OpenAI-compatible endpoint answers, typed and checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from clients import shapes
from clients.wire import AnswerError, BrokenAnswerError

Raw = dict[str, Any]

# Also those that JSON can't hold, which some servers send.
_number = shapes.scalar("a number", lambda value: type(value) in (int, float))
_whole = shapes.scalar("a whole number", lambda value: type(value) is int)
_numbers = shapes.each(shapes.or_null(_number))
_USAGE = shapes.fields(
    {}, dict.fromkeys(("prompt_tokens", "completion_tokens"), shapes.or_null(_number))
)
_LOGPROBS = shapes.fields(
    {
        "tokens": shapes.each(shapes.text),
        "token_logprobs": _numbers,
    },
    # SGLang has -1 throughout.
    {"text_offset": shapes.or_null(shapes.each(_whole))},
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
#: What the events are while a session learns: of a chunk, and in the end of them all.
LESSON_CHUNK, LESSON_REPORT = "session.adaptation.chunk", "session.adaptation"
_LESSON = {
    LESSON_CHUNK: shapes.fields(
        {
            "action": shapes.text,
            "reason": shapes.text,
            "tokens": shapes.scalar(
                "two whole numbers from 0 on",
                lambda value: (
                    isinstance(value, list) and len(value) == 2 and all(map(shapes.is_count, value))
                ),
            ),
            **dict.fromkeys(("nominal", "measured"), shapes.number),
            **dict.fromkeys(("loss_before", "loss_after"), shapes.or_null(_number)),
        }
    ),
    LESSON_REPORT: shapes.fields(
        {
            "gate": shapes.text,
            "cost": shapes.fields(dict.fromkeys(("nominal", "measured", "seconds"), shapes.number)),
            "documents": shapes.each(shapes.fields({"tokens": shapes.count})),
            **dict.fromkeys(("tokens", "version_before", "version_after"), shapes.count),
        }
    ),
}
# What is read of a session, which not everybody needs.
_SESSION = shapes.fields(
    {},
    {
        "digest": shapes.or_null(shapes.text),
        "chunks_by_action": shapes.or_null(shapes.fields({})),
        "cost": shapes.or_null(
            shapes.fields(dict.fromkeys(("nominal", "measured"), shapes.number))
        ),
        **dict.fromkeys(("version", "chunks", "learned_tokens"), shapes.count),
    },
)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities in nats, token by token; None for a first token, which nothing predicts.

    Args:
        tokens: their texts.
        token_logprobs: of them.
        text_offset: where in the choice's text each begins, in characters; below 0 where the server
            doesn't say and they don't add up to the text.
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
        cached_tokens: of the prompt, read before; None where the server doesn't tell.
        ttt: what was learned; None of servers that don't learn.
        raw: the answer as it came.
        seconds: from sending the request to the last byte, without waits before it was accepted.
    """

    choices: tuple[Choice, ...]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None
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
    counts = (prompt_tokens or 0, completion_tokens or 0, _cached(raw))
    return Completion(choices, *counts, _ttt(raw), raw, seconds)


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
        index = _checked("index", each.get("index"), shapes.or_null(shapes.count))
        yield CompletionChunk(index or 0, choice.text, choice.finish_reason, choice.logprobs, *rest)


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
    return dict(_flat("server", shapes.finite(ttt))) if isinstance(ttt, Mapping) else {}


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


def session_state(raw: Raw) -> Raw:
    """From the answer about a session.

    Raises:
        AnswerError: a field is of another type.
    """
    return dict(_checked("session", raw, _SESSION))


@dataclass(slots=True)
class LessonReader:
    """The events of a session that learns: its chunks, and the report that has to follow."""

    _reported: bool = False

    def read(self, raw: Raw) -> Raw:
        """An event, with null for the numbers that JSON can't hold.

        Raises:
            AnswerError: it doesn't say what it is, or lacks a field.
        """
        kind = field_of(raw, "object", str)
        if kind in _LESSON:
            _checked("event", raw, _LESSON[kind])
        self._reported |= kind == LESSON_REPORT
        return dict(shapes.finite(raw))

    def finish(self) -> None:
        """No more events come.

        Raises:
            BrokenAnswerError: there was no report.
        """
        if not self._reported:
            raise BrokenAnswerError(0, "the server ended its answer without a report of the lesson")


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
    return Choice(text, reason, _logprobs(raw.get("logprobs"), text))


def _content(message: Raw) -> str:
    """The text of a message, which may be in parts."""
    content = message.get("content")
    # Null where the model only calls tools; left out of pieces that bring no text.
    if content is None or isinstance(content, str):
        return content or ""
    parts = _objects(message, "content")
    return "".join(field_of(each, "text", str) for each in parts if each.get("type") == "text")


def _logprobs(raw: object, text: str) -> Logprobs | None:
    if not isinstance(raw, Mapping):
        return None
    content = raw.get("content")
    if isinstance(content, Sequence):
        # The form of chats, which llama.cpp uses for completions, too.
        tokens = [field_of(each, "token", str) for each in content]
        values = _checked("logprob", [each.get("logprob") for each in content], _numbers)
        return Logprobs(tuple(tokens), tuple(values), _offsets(tokens))
    _checked("logprobs", raw, _LOGPROBS)
    tokens, offsets = raw["tokens"], raw.get("text_offset")
    if offsets is None or any(offset < 0 for offset in offsets):
        offsets = _offsets(tokens) if "".join(tokens) == text else [-1] * len(tokens)
    return Logprobs(tuple(tokens), tuple(raw["token_logprobs"]), tuple(offsets))


def _offsets(tokens: Sequence[str]) -> tuple[int, ...]:
    """Where each begins in a text that they add up to."""
    return tuple(accumulate(map(len, tokens[:-1]), initial=0)) if tokens else ()


def _usage(raw: Raw) -> tuple[int | None, int | None]:
    usage = _checked("usage", raw.get("usage"), shapes.or_null(_USAGE))
    prompt, generated = ((usage or {}).get(f"{what}_tokens") for what in ("prompt", "completion"))
    if prompt is None and generated is None:
        return None, None
    return _count(prompt), _count(generated)


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
