"""The same endpoint for programs that do many things at once; see `clients.api`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Self, Unpack

import httpx

from clients import answers, calls, events, wire
from clients.answers import Completion, CompletionChunk
from clients.calls import Call, ChatOptions, CompletionOptions, Message, Prompt
from clients.wire import Backoff, ServerError

__all__ = ["AsyncClient"]


class AsyncClient:
    """One endpoint. Close it, or use it in an `async with` block.

    Methods, arguments and errors are those of `clients.api.Client`.
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
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.base_url = wire.public_url(base_url)
        self._timeout = timeout
        self._learning_timeout = learning_timeout or max(timeout, calls.LEARNING_SECONDS)
        self._backoff = Backoff(retries, first_wait, busy=busy)
        with wire.translated(self.base_url, timeout):
            self._http = httpx.AsyncClient(
                base_url=base_url.rstrip("/").removesuffix("/v1"),
                timeout=timeout,
                headers=wire.headers(api_key),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
                transport=transport,
            )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def models(self) -> list[str]:
        """Names of the served models."""
        return answers.model_names(await self._json(Call("GET", "/v1/models")))

    async def context_length(self, model: str | None = None) -> int | None:
        """Tokens of prompt and answer together; None where the server doesn't say."""
        return answers.model_context(await self._json(Call("GET", "/v1/models")), model)

    async def server_settings(self, model: str | None = None) -> dict[str, Any]:
        """How the server learns where a request doesn't say; as `Client.server_settings`."""
        return answers.server_settings(await self._json(Call("GET", "/v1/models")), model)

    async def version(self) -> str | None:
        """The server's name and version; None where it doesn't say."""
        for path, read in answers.VERSION_PATHS:
            try:
                found = read(await self._json(Call("GET", path)))
            except ServerError as error:
                # A server that is only busy has the same version as ever.
                if not wire.lacks_route(error):
                    raise
                continue
            if found is not None:
                return found
        return None

    async def complete(self, prompt: Prompt, **options: Unpack[CompletionOptions]) -> Completion:
        """Continue a text."""
        raw, seconds = await self._fetch(calls.completion_call(prompt, options, stream=False))
        return answers.completion(raw, seconds)

    def stream(
        self, prompt: Prompt, **options: Unpack[CompletionOptions]
    ) -> AsyncGenerator[CompletionChunk]:
        """Continue a text, piece by piece. Closing the generator aborts the request."""
        return self._chunks(calls.completion_call(prompt, options, stream=True))

    async def chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Completion:
        """Answer a chat."""
        raw, seconds = await self._fetch(calls.chat_call(messages, options, stream=False))
        return answers.completion(raw, seconds)

    def stream_chat(
        self, messages: Sequence[Message], **options: Unpack[ChatOptions]
    ) -> AsyncGenerator[CompletionChunk]:
        """Answer a chat, piece by piece."""
        return self._chunks(calls.chat_call(messages, options, stream=True))

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with those that open every prompt."""
        ours, other = calls.tokenize_calls(text)
        ids = answers.token_ids(await self._json(ours))
        # llama.cpp takes no notice of a field that it doesn't know.
        return ids if ids or not text else answers.token_ids(await self._json(other))

    async def session(self, name: str) -> dict[str, Any] | None:
        """A session, or None if there is none of this name."""
        try:
            return answers.session_state(await self._json(Call("GET", calls.session_path(name))))
        except ServerError as error:
            if error.status == 404:
                return None
            raise

    async def sessions(self) -> list[dict[str, Any]]:
        """All sessions; 404 of servers that have none."""
        return answers.objects(await self._json(Call("GET", "/v1/sessions")))

    async def create_session(self, name: str, **options: Any) -> dict[str, Any]:
        """A new session."""
        return await self._json(Call("POST", "/v1/sessions", {"id": name, **options}))

    async def delete_session(self, name: str) -> None:
        """Forget a session."""
        await self._json(Call("DELETE", calls.session_path(name)))

    async def fork(self, name: str, new: str) -> dict[str, Any]:
        """A copy of a session that goes its own way."""
        return await self._json(Call("POST", calls.session_path(name, "fork"), {"id": new}))

    def adapt(
        self, session: str, documents: Sequence[Mapping[str, str]], options: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, Any]]:
        """Teach a session; every chunk as it is learned, then the report."""
        return self._lesson(calls.adapt_call(session, documents, options))

    async def _json(self, call: Call) -> dict[str, Any]:
        return (await self._fetch(call))[0]

    async def _fetch(self, call: Call) -> tuple[dict[str, Any], float]:
        """An answer in one piece, and the seconds that it took."""
        async with self._answer(call) as (response, begun):
            answer = await self._read(response, call)
            return wire.json_object(answer), time.perf_counter() - begun

    async def _chunks(self, call: Call) -> AsyncGenerator[CompletionChunk]:
        async with (
            self._answer(call) as (response, begun),
            aclosing(self._events(response, call)) as found,
        ):
            async for raw in found:
                for chunk in answers.chunks(raw, time.perf_counter() - begun):
                    yield chunk

    async def _lesson(self, call: Call) -> AsyncGenerator[dict[str, Any]]:
        lesson = answers.LessonReader()
        async with (
            self._answer(call) as (response, _),
            aclosing(self._events(response, call)) as found,
        ):
            async for raw in found:
                yield lesson.read(raw)
        lesson.finish()

    @asynccontextmanager
    async def _answer(self, call: Call) -> AsyncIterator[tuple[httpx.Response, float]]:
        """The first answer that counts and is no error, and when it was asked for."""
        seconds = self._seconds(call)
        limits = httpx.Timeout(call.timeout or self._timeout, read=seconds)
        attempt = 0
        while True:
            begun = time.perf_counter()
            with wire.translated(self.base_url, seconds):
                async with self._http.stream(
                    call.method, call.path, json=call.body, timeout=limits
                ) as response:
                    wait = self._backoff.again(response, attempt)
                    if wait is None:
                        if not response.is_success:
                            wire.check(await self._read(response, call), attempt + 1)
                        yield response, begun
                        return
            await asyncio.sleep(wait)
            attempt += 1

    async def _read(self, response: httpx.Response, call: Call) -> httpx.Response:
        """The whole body, for which a server that trickles gets no more time than others."""
        content = bytearray()
        async with asyncio.timeout(call.timeout or self._timeout):
            async for piece in response.aiter_bytes():
                content += piece
        return wire.read_answer(response, bytes(content))

    async def _events(self, response: httpx.Response, call: Call) -> AsyncGenerator[dict[str, Any]]:
        if not events.may_stream(response):
            raise events.no_stream(await self._read(response, call))
        parser = events.EventParser()
        patience = events.Patience(self.base_url, self._seconds(call))
        async for piece in response.aiter_bytes():
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
