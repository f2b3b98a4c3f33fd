"""What both clients say of a server that is busy, fails or cuts them off."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from clients.api import Client
from clients.async_api import AsyncClient
from clients.calls import LOOKUP_RETRIES, LOOKUP_WAIT
from clients.wire import AnswerError, Backoff, BrokenAnswerError, ServerError

Handler = Callable[[httpx.Request], httpx.Response]
Ask = Callable[..., list[str]]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Asks a server for its models; what was said before the answer, or the error that came."""

    async def no_wait(seconds: float) -> None:
        del seconds

    monkeypatch.setattr("clients.api.time.sleep", lambda seconds: None)
    monkeypatch.setattr("clients.async_api.asyncio.sleep", no_wait)

    def sync(handler: Handler, said: list[str], **options: Any) -> list[str]:
        transport = httpx.MockTransport(handler)
        with Client("http://here", transport=transport, busy=said.append, **options) as client:
            return client.models()

    def asynchronous(handler: Handler, said: list[str], **options: Any) -> list[str]:
        async def main() -> list[str]:
            transport = httpx.MockTransport(handler)
            async with AsyncClient(
                "http://here", transport=transport, busy=said.append, **options
            ) as client:
                return await client.models()

        return asyncio.run(main())

    return sync if request.param == "sync" else asynchronous


def test_every_wait_for_a_busy_server_is_said(ask: Ask) -> None:
    busy = [httpx.Response(429, headers={"Retry-After": "32"}), httpx.Response(503)]
    answers = iter([*busy, httpx.Response(200, json={"data": [{"id": "m"}]})])
    said: list[str] = []
    assert ask(lambda _: next(answers), said, retries=6) == ["m"]
    assert said[0] == "the server is busy (429), asking again in 32 s, 1 of 6"
    assert re.fullmatch(r"the server is busy \(503\), asking again in [\d.]+ s, 2 of 6", said[1]), (
        said
    )


def test_few_retries_outlast_some_seconds_of_loading() -> None:
    for _ in range(50):
        backoff = Backoff(LOOKUP_RETRIES, LOOKUP_WAIT)
        waits = [backoff.again(httpx.Response(503), attempt) or 0.0 for attempt in range(3)]
        assert waits[2] == 0.0
        assert 6.0 <= sum(waits) <= 12.0


def test_nothing_is_said_where_nothing_is_waited_for(ask: Ask) -> None:
    said: list[str] = []
    with pytest.raises(ServerError, match="429"):
        ask(lambda _: httpx.Response(429), said, retries=0)
    assert said == []
    assert Backoff(retries=1).again(httpx.Response(429), 0) is not None


@pytest.mark.parametrize("error", [{"message": "model exploded"}, "model exploded"])
def test_error_with_status_200_passes_the_servers_words_on(ask: Ask, error: object) -> None:
    with pytest.raises(ServerError, match="answered 200, but: model exploded") as raised:
        ask(lambda _: httpx.Response(200, json={"error": error}), [])
    assert not isinstance(raised.value, AnswerError)


@pytest.mark.parametrize("error", [None, ""])
def test_answer_that_speaks_of_no_error_is_none(ask: Ask, error: object) -> None:
    answer = httpx.Response(200, json={"data": [{"id": "m"}], "error": error})
    assert ask(lambda _: answer, []) == ["m"]


def test_connection_that_is_cut_without_a_word_has_the_name_of_the_error(ask: Ask) -> None:
    def cut(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("")

    with pytest.raises(BrokenAnswerError, match=r"to http://here broke off: ReadError$"):
        ask(cut, [])
