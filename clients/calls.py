"""What is asked of an endpoint: method, path and body of every call, without input or output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict
from urllib.parse import quote

from ponderttt.errors import InvalidRequestError

Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
Message = Mapping[str, Any]
#: A chunk may wait behind others that are learned.
LEARNING_SECONDS = 600.0
#: Times that a request is sent again to a busy server.
RETRIES = 10
#: Seconds before the first of these, or half of it; see `clients.wire.Backoff`.
FIRST_WAIT = 0.5
#: The same of what is looked up before a run, when there is nothing to lose yet. In all some 10 s,
#: in which a server may come to the end of loading.
LOOKUP_RETRIES = 2
LOOKUP_WAIT = 4.0


@dataclass(frozen=True, slots=True)
class Call:
    """One request.

    Args:
        method, path, body: of HTTP.
        timeout: seconds until an answer, in a stream until its next event; None: the client's.
        learns: the answer tells how learning comes on, for which the client has a limit of its own.
    """

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    timeout: float | None = None
    learns: bool = False


class ChatOptions(TypedDict, total=False):
    """How to answer. What is left out or None is not sent, but for the three with a default.

    model: as the server names it; servers of a single model need none.
    max_tokens: new tokens at most; 16.
    temperature: 0 is greedy; 0.
    top_p: nucleus mass; 1.
    n: choices; 1.
    stop: texts that end the answer.
    seed: the same gives the same text.
    ttt: test-time training; only our server knows it.
    timeout: seconds until an answer, in a stream until its next event.
    extra: further fields of the body, for servers that have them.
    """

    model: str | None
    max_tokens: int
    temperature: float
    top_p: float
    n: int
    stop: str | Sequence[str] | None
    seed: int | None
    ttt: Mapping[str, Any] | None
    timeout: float | None
    extra: Mapping[str, Any] | None


class CompletionOptions(ChatOptions, total=False):
    """As in a chat, and more.

    logprobs: how many alternatives to report beside each token's log-probability.
    echo: begin the text with the prompt; with max_tokens 0 and logprobs, score the prompt.
    suffix: what follows the text to be filled in.
    """

    logprobs: int | None
    echo: bool
    suffix: str | None


_DEFAULTS: dict[str, Any] = {"max_tokens": 16, "temperature": 0.0}
# Sent only where they say more than their absence does.
_UNSAID: dict[str, Any] = {"top_p": 1.0, "n": 1, "echo": False}


def completion_call(prompt: Prompt, options: CompletionOptions, stream: bool) -> Call:
    """`POST /v1/completions`."""
    content = prompt if isinstance(prompt, str) else list(prompt)
    return _generation("/v1/completions", {"prompt": content}, options, stream)


def chat_call(messages: Sequence[Message], options: ChatOptions, stream: bool) -> Call:
    """`POST /v1/chat/completions`."""
    content = {"messages": [dict(message) for message in messages]}
    return _generation("/v1/chat/completions", content, options, stream)


def _generation(path: str, content: Mapping[str, Any], options: ChatOptions, stream: bool) -> Call:
    given: dict[str, Any] = _DEFAULTS | dict(options)
    timeout, extra = given.pop("timeout", None), given.pop("extra", None) or {}
    body = {
        name: value
        for name, value in given.items()
        if value is not None and (name not in _UNSAID or value != _UNSAID[name])
    }
    if not isinstance(body.get("stop", ""), str):
        body["stop"] = list(body["stop"])
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    clash = sorted((body.keys() | content.keys()) & extra.keys())
    if clash:
        raise InvalidRequestError("extra", f"{', '.join(clash)} has an option of its own; use it")
    return Call("POST", path, {**content, **body, **extra}, timeout)


def session_path(name: str, *rest: str) -> str:
    """Of a session or one of its actions."""
    return "/".join(["/v1/sessions", quote(name, safe=""), *rest])


def adapt_call(
    session: str, documents: Sequence[Mapping[str, str]], options: Mapping[str, Any]
) -> Call:
    """`POST /v1/sessions/{id}/adapt`; learning may take any time, as long as it comes on."""
    body = {**options, "documents": list(documents), "stream": True}
    return Call("POST", session_path(session, "adapt"), body, learns=True)


def tokenize_calls(text: str) -> tuple[Call, Call]:
    """`POST /tokenize` as vLLM and we have it, and as llama.cpp has it."""
    return Call("POST", "/tokenize", {"prompt": text}), Call("POST", "/tokenize", {"content": text})
