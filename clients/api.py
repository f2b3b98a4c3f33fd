"""An OpenAI-compatible endpoint over HTTP, and what PonderTTT's own server has besides."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self, Unpack

import httpx

from clients import answers, calls, events, wire
from clients.answers import Choice, Completion, CompletionChunk, Logprobs
from clients.calls import Call, ChatOptions, CompletionOptions, Message, Prompt
from clients.wire import (
    AnswerError,
    Backoff,
    BrokenAnswerError,
    ServerError,
    SlowError,
    UnreachableError,
)

__all__ = [
    "AnswerError",
    "BrokenAnswerError",
    "Choice",
    "Client",
    "Completion",
    "CompletionChunk",
    "Logprobs",
    "ServerError",
    "SlowError",
    "UnreachableError",
]


class Client:
    """One endpoint. May be used by several threads; close it, or use it in a `with` block.

    Every method raises `ServerError` where the endpoint refuses or fails (see `clients.wire` for
    its kinds). Answers 429 and 503 are waited out and asked again.

    Args:
        base_url: with or without `/v1`.
        timeout: seconds to connect, and to wait for an answer, or in a stream for its next event.
        learning_timeout: seconds until learning has come on by a chunk; None: `timeout`, but 600
            at least. In all, learning takes as long as it takes.
        api_key: sent as a bearer token.
        retries: times that a request is sent again after 429 or 503.
        first_wait: seconds before the first of these, or half of it; they double.
        busy: called before each wait for that, with what a user should know.
        transport: instead of the network, for tests.
    """

    def __init__(
        self,
        base_url: str,
        timeout: float = 30.0,
        *,
        learning_timeout: float | None = None,
        api_key: str | None = None,
        retries: int = calls.RETRIES,
        first_wait: float = calls.FIRST_WAIT,
        busy: Callable[[str], None] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url = wire.public_url(base_url)
        self._timeout = timeout
        self._learning_timeout = learning_timeout or max(timeout, calls.LEARNING_SECONDS)
        self._backoff = Backoff(retries, first_wait, busy=busy)
        with wire.translated(self.base_url, timeout):
            self._http = httpx.Client(
                base_url=base_url.rstrip("/").removesuffix("/v1"),
                timeout=timeout,
                headers=wire.headers(api_key),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
                transport=transport,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def models(self) -> list[str]:
        """Names of the served models."""
        return answers.model_names(self._json(Call("GET", "/v1/models")))

    def context_length(self, model: str | None = None) -> int | None:
        """Tokens of prompt and answer together; None where the server doesn't say.

        Args:
            model: default: the first.
        """
        return answers.model_context(self._json(Call("GET", "/v1/models")), model)

    def server_settings(self, model: str | None = None) -> dict[str, Any]:
        """How the server learns where a request doesn't say, for the settings of a result file.

        Args:
            model: default: the first.
        Returns:
            By name, all of which begin with `server.`; empty of servers that don't learn.
        """
        return answers.server_settings(self._json(Call("GET", "/v1/models")), model)

    def version(self) -> str | None:
        """The server's name and version; None where it doesn't say."""
        for path, read in answers.VERSION_PATHS:
            try:
                found = read(self._json(Call("GET", path)))
            except ServerError as error:
                # A server that is only busy has the same version as ever.
                if not wire.lacks_route(error):
                    raise
                continue
            if found is not None:
                return found
        return None

    def complete(self, prompt: Prompt, **options: Unpack[CompletionOptions]) -> Completion:
        """Continue a text.

        Args:
            prompt: text, texts, token ids, or several lists of them.
            options: see `CompletionOptions`.
        """
        raw, seconds = self._fetch(calls.completion_call(prompt, options, stream=False))
        return answers.completion(raw, seconds)

    def stream(
        self, prompt: Prompt, **options: Unpack[CompletionOptions]
    ) -> Iterator[CompletionChunk]:
        """Continue a text, piece by piece. Closing the iterator aborts the request.

        Args:
            prompt: as for `complete`.
            options: see `CompletionOptions`.
        """
        return self._chunks(calls.completion_call(prompt, options, stream=True))

    def chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Completion:
        """Answer a chat.

        Args:
            messages: each with `role` and `content`.
            options: see `ChatOptions`.
        """
        raw, seconds = self._fetch(calls.chat_call(messages, options, stream=False))
        return answers.completion(raw, seconds)

    def stream_chat(
        self, messages: Sequence[Message], **options: Unpack[ChatOptions]
    ) -> Iterator[CompletionChunk]:
        """Answer a chat, piece by piece; as `chat`."""
        return self._chunks(calls.chat_call(messages, options, stream=True))

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with those that open every prompt."""
        ours, other = calls.tokenize_calls(text)
        ids = answers.token_ids(self._json(ours))
        # llama.cpp takes no notice of a field that it doesn't know.
        return ids if ids or not text else answers.token_ids(self._json(other))

    def session(self, name: str) -> dict[str, Any] | None:
        """A session, or None if there is none of this name."""
        try:
            return answers.session_state(self._json(Call("GET", calls.session_path(name))))
        except ServerError as error:
            if error.status == 404:
                return None
            raise

    def sessions(self) -> list[dict[str, Any]]:
        """All sessions; 404 of servers that have none."""
        return answers.objects(self._json(Call("GET", "/v1/sessions")))

    def create_session(self, name: str, **options: Any) -> dict[str, Any]:
        """A new session.

        Args:
            name: its id.
            options: gate, budget, …: how its requests learn where they don't say otherwise.
        """
        return self._json(Call("POST", "/v1/sessions", {"id": name, **options}))

    def delete_session(self, name: str) -> None:
        """Forget a session."""
        self._json(Call("DELETE", calls.session_path(name)))

    def fork(self, name: str, new: str) -> dict[str, Any]:
        """A copy of a session that goes its own way."""
        return self._json(Call("POST", calls.session_path(name, "fork"), {"id": new}))

    def adapt(
        self, session: str, documents: Sequence[Mapping[str, str]], options: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Teach a session; every chunk as it is learned, then the report.

        Args:
            session: its id.
            documents: each with `path` and `text`.
            options: gate, budget, …
        """
        return self._lesson(calls.adapt_call(session, documents, options))

    def _json(self, call: Call) -> dict[str, Any]:
        return self._fetch(call)[0]

    def _fetch(self, call: Call) -> tuple[dict[str, Any], float]:
        """An answer in one piece, and the seconds that it took."""
        with self._answer(call) as (response, begun):
            answer = self._read(response, call)
            return wire.json_object(answer), time.perf_counter() - begun

    def _chunks(self, call: Call) -> Iterator[CompletionChunk]:
        with self._answer(call) as (response, begun):
            for raw in self._events(response, call):
                yield from answers.chunks(raw, time.perf_counter() - begun)

    def _lesson(self, call: Call) -> Iterator[dict[str, Any]]:
        lesson = answers.LessonReader()
        with self._answer(call) as (response, _):
            for raw in self._events(response, call):
                yield lesson.read(raw)
        lesson.finish()

    @contextmanager
    def _answer(self, call: Call) -> Iterator[tuple[httpx.Response, float]]:
        """The first answer that counts and is no error, and when it was asked for."""
        seconds = self._seconds(call)
        limits = httpx.Timeout(call.timeout or self._timeout, read=seconds)
        attempt = 0
        while True:
            begun = time.perf_counter()
            with (
                wire.translated(self.base_url, seconds),
                self._http.stream(
                    call.method, call.path, json=call.body, timeout=limits
                ) as response,
            ):
                wait = self._backoff.again(response, attempt)
                if wait is None:
                    if not response.is_success:
                        wire.check(self._read(response, call), attempt + 1)
                    yield response, begun
                    return
            time.sleep(wait)
            attempt += 1

    def _read(self, response: httpx.Response, call: Call) -> httpx.Response:
        """The whole body, for which a server that trickles gets no more time than others."""
        until = time.monotonic() + (call.timeout or self._timeout)
        content = bytearray()
        for piece in response.iter_bytes():
            content += piece
            if time.monotonic() > until:
                raise TimeoutError
        return wire.read_answer(response, bytes(content))

    def _events(self, response: httpx.Response, call: Call) -> Iterator[dict[str, Any]]:
        if not events.may_stream(response):
            raise events.no_stream(self._read(response, call))
        parser = events.EventParser()
        patience = events.Patience(self.base_url, self._seconds(call))
        for piece in response.iter_bytes():
            for event in parser.feed(piece):
                yield event
                patience.note(event)
            if parser.done:
                return
            patience.check()
        parser.finish()

    def _seconds(self, call: Call) -> float:
        """Until an answer, in a stream until its next event."""
        return call.timeout or (self._learning_timeout if call.learns else self._timeout)
