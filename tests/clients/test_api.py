"""Both clients, against servers that answer badly, and against a real one."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from clients.api import (
    AnswerError,
    BrokenAnswerError,
    Client,
    ServerError,
    SlowError,
    UnreachableError,
)
from clients.async_api import AsyncClient
from clients.events import EventParser
from clients.wire import Backoff
from ponderttt.errors import InvalidRequestError
from tests.clients.test_answers import CHUNK, REPORT
from tests.server.live import PROMPT, Live, live_server

WHOLE = {
    "choices": [{"index": 0, "text": "x", "finish_reason": "stop", "logprobs": None}],
    "usage": {"prompt_tokens": 2, "completion_tokens": 1},
}
Handler = Callable[[httpx.Request], httpx.Response]
#: Calls a method of either client and gathers what it gives.
Caller = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Caller:
    """Calls a method; waits between attempts take no time and are listed in `call.waited`."""
    waited: list[float] = []
    transport = httpx.MockTransport

    def sync(handler: Handler, method: str, *args: Any, **options: Any) -> Any:
        client = Client("http://test/v1", 1.0, transport=transport(handler), retries=3)
        monkeypatch.setattr("clients.api.time.sleep", waited.append)
        with client:
            answer = getattr(client, method)(*args, **options)
            return list(answer) if inspect.isgenerator(answer) else answer

    def asynchronous(handler: Handler, method: str, *args: Any, **options: Any) -> Any:
        real = asyncio.sleep

        async def sleep(seconds: float) -> None:
            waited.append(seconds)
            await real(0)

        async def main() -> Any:
            monkeypatch.setattr("clients.async_api.asyncio.sleep", sleep)
            client = AsyncClient("http://test/v1", 1.0, transport=transport(handler), retries=3)
            async with client:
                answer = getattr(client, method)(*args, **options)
                if inspect.isasyncgen(answer):
                    return [each async for each in answer]
                return await answer

        return asyncio.run(main())

    caller = sync if request.param == "sync" else asynchronous
    caller.waited = waited  # type: ignore[attr-defined]
    return caller


def fails(error: Exception) -> Handler:
    def handler(request: httpx.Request) -> httpx.Response:
        raise error

    return handler


@pytest.mark.parametrize("method", ["complete", "stream"])
@pytest.mark.parametrize(
    ("handler", "kind", "tells"),
    [
        (fails(httpx.ConnectError("refused")), UnreachableError, "ponderttt serve"),
        (fails(httpx.ReadTimeout("slow")), SlowError, "within 1 s"),
        (fails(httpx.ReadError("reset")), BrokenAnswerError, "broke off"),
        (lambda _: httpx.Response(200, html="<b>Log in</b>"), AnswerError, "text/html"),
        (lambda _: httpx.Response(502, html="<b>Bad gate</b>"), ServerError, "502: Bad gate$"),
        (lambda _: httpx.Response(302, headers={"Location": "/a"}), ServerError, "on to /a"),
        (lambda _: httpx.Response(400, json={"error": {"message": "no!"}}), ServerError, "no!"),
        (lambda _: httpx.Response(400, json={"detail": "no!"}), ServerError, "400: no!"),
        (lambda _: httpx.Response(200, json={"id": 1}), AnswerError, "endpoint"),
        (lambda _: httpx.Response(200, json=[1]), AnswerError, "OpenAI-compatible"),
    ],
)
def test_endpoint_that_answers_badly_is_a_clear_error(
    call: Caller, handler: Handler, kind: type[ServerError], tells: str, method: str
) -> None:
    with pytest.raises(kind, match=tells):
        call(handler, method, "a")


@pytest.mark.parametrize(
    ("text", "kind", "tells"),
    [
        ("", BrokenAnswerError, "after 0 events"),
        (f"data: {json.dumps(WHOLE)}\n\n", BrokenAnswerError, "after 1 events"),
        (f'data: {json.dumps(WHOLE)}\n\ndata: {{"cho', BrokenAnswerError, "after 1 events"),
        ('data: {"error": {"message": "it broke"}}\n\n', ServerError, "it broke"),
        ("data: oops\n\n", AnswerError, "oops"),
        ('data: {"choices": 3}\n\n', AnswerError, "choices"),
        ('data: {"choices": [{"index": 0}]}\n\n', AnswerError, "text"),
    ],
)
def test_stream_that_does_not_end_well_is_an_error(
    call: Caller, text: str, kind: type[ServerError], tells: str
) -> None:
    with pytest.raises(kind, match=tells):
        call(lambda _: httpx.Response(200, text=text), "stream", "a")


class Endless(httpx.SyncByteStream, httpx.AsyncByteStream):
    """Pieces for ever, each a second of a clock of its own after the one before."""

    def __init__(self, piece: Callable[[int], str]) -> None:
        self.seconds = 0
        self._piece = piece

    def __iter__(self) -> Iterator[bytes]:
        for number in range(3000):
            self.seconds += 1
            yield self._piece(number).encode()
        raise AssertionError("nobody has given up")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece


def progress(done: int, total: int) -> str:
    return f"data: {json.dumps(CHUNK | {'progress': [done, total]})}\n\n"


@pytest.mark.parametrize(
    ("arguments", "piece", "limit", "lasts"),
    [
        (("stream", "a"), lambda _: ": ping\n\n", 1, 2),
        (("stream", "a"), lambda _: "data: ", 1, 2),
        (("adapt", "s", [], {}), lambda _: ": ping\n\n", 600, 601),
        (("adapt", "s", [], {}), lambda _: progress(3, 9), 600, 602),
        (("adapt", "s", [], {}), lambda number: progress(number, number + 1), 600, 602),
        (("adapt", "s", [], {}), lambda number: progress(min(number, 900), 950), 600, 1502),
    ],
    ids=["pings", "no end", "pings to a lesson", "standstill", "moving end", "late standstill"],
)
def test_stream_that_brings_nothing_new_is_given_up(
    call: Caller,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[Any, ...],
    piece: Callable[[int], str],
    limit: int,
    lasts: int,
) -> None:
    stream = Endless(piece)
    monkeypatch.setattr("clients.events.time", SimpleNamespace(monotonic=lambda: stream.seconds))
    with pytest.raises(SlowError, match=f"nothing new for {limit} s.*allow more time"):
        call(lambda _: httpx.Response(200, stream=stream), *arguments)
    assert abs(stream.seconds - lasts) <= 1


@pytest.mark.parametrize(("given", "limit"), [(None, 900), (5.0, 5)])
def test_learning_has_a_limit_of_its_own(
    monkeypatch: pytest.MonkeyPatch, given: float | None, limit: int
) -> None:
    stream = Endless(lambda _: ": ping\n\n")
    monkeypatch.setattr("clients.events.time", SimpleNamespace(monotonic=lambda: stream.seconds))
    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=stream))
    with (
        Client("http://test", 900.0, learning_timeout=given, transport=transport) as client,
        pytest.raises(SlowError, match=f"for {limit} s"),
    ):
        list(client.adapt("s", [], {}))


def test_busy_server_is_asked_again_as_it_says_and_else_ever_later(call: Caller) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    answers = iter([
        httpx.Response(429, headers={"Retry-After": "3"}),
        httpx.Response(503, headers={"Retry-After": later}),
        httpx.Response(503),
        httpx.Response(200, json=WHOLE),
    ])  # fmt: skip
    assert call(lambda _: next(answers), "complete", "a").text == "x"
    asked, date, own = call.waited  # type: ignore[attr-defined]
    assert asked == 3.0
    assert 25 < date <= 30
    assert 1.0 <= own <= 2.0


@pytest.mark.parametrize("method", ["complete", "stream"])
def test_server_that_is_busy_for_ever_is_given_up(call: Caller, method: str) -> None:
    full = httpx.Response(429, json={"error": {"message": "queue is full"}})
    with pytest.raises(ServerError, match=r"429: queue is full \(tried 4 times\)") as raised:
        call(lambda _: full, method, "a")
    assert raised.value.status == 429
    assert len(call.waited) == 3  # type: ignore[attr-defined]


def test_other_errors_are_not_asked_again(call: Caller) -> None:
    with pytest.raises(ServerError, match="500"):
        call(lambda _: httpx.Response(500), "complete", "a")
    assert call.waited == []  # type: ignore[attr-defined]


def test_waits_double_with_jitter_up_to_the_longest() -> None:
    backoff, busy = Backoff(retries=2000, first=1.0, longest=20.0), httpx.Response(429)
    for attempt in (0, 1, 2, 3, 4, 5, 1999):
        full = min(2.0 ** min(attempt, 9), 20.0)
        waits = [backoff.again(busy, attempt) for _ in range(50)]
        assert all(wait is not None and full / 2 <= wait <= full for wait in waits)
        assert len(set(waits)) > 40
    assert backoff.again(busy, 2000) is None
    assert backoff.again(httpx.Response(200), 0) is None


def test_only_what_was_given_is_sent(call: Caller) -> None:
    bodies: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json=WHOLE)

    call(handler, "complete", "a", ttt=None, stop=None, echo=False, n=1)
    assert bodies[-1] == {"prompt": "a", "max_tokens": 16, "temperature": 0.0}
    call(handler, "complete", [1, 2], ttt={"gate": "off"}, stop=("x",), extra={"top_k": 3})
    assert bodies[-1]["prompt"] == [1, 2]
    assert bodies[-1]["ttt"] == {"gate": "off"}
    assert (bodies[-1]["stop"], bodies[-1]["top_k"]) == (["x"], 3)
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        call(handler, "complete", "a", extra={"max_tokens": 3})


@pytest.mark.parametrize(
    ("path", "answer", "version"),
    [
        ("/version", {"version": "0.9"}, "vLLM 0.9"),
        ("/openapi.json", {"info": {"title": "PonderTTT", "version": "1"}}, "PonderTTT 1"),
        ("/props", {"build_info": "b42"}, "llama.cpp b42"),
        ("/nowhere", {}, None),
    ],
)
def test_version_is_found_where_each_server_has_it(
    call: Caller, path: str, answer: dict[str, Any], version: str | None
) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == path:
            return httpx.Response(200, json=answer)
        return httpx.Response(404, text="<html>nothing</html>")

    assert call(handler, "version") == version


@pytest.mark.parametrize(
    ("card", "settings"),
    [
        ({"id": "a"}, {}),
        ({"id": "a", "ttt": "yes"}, {}),
        ({"id": "b", "ttt": {"gate": "off"}}, {}),
        (
            {"id": "a", "ttt": {"gate": "off", "lora": {"rank": 2, "targets": ["x"]}}},
            {"server.gate": "off", "server.lora.rank": 2, "server.lora.targets": ["x"]},
        ),
    ],
)
def test_server_settings_are_those_of_the_model_and_none_of_other_servers(
    call: Caller, card: dict[str, Any], settings: dict[str, Any]
) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"data": [card]})

    assert call(handler, "server_settings", "a") == settings


def test_key_is_sent_and_never_shown() -> None:
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["Authorization"])
        return httpx.Response(200, json={"data": []})

    with Client("http://test", api_key="s3cret", transport=httpx.MockTransport(handler)) as client:
        assert client.models() == []
    assert seen == ["Bearer s3cret"]
    with pytest.raises(InvalidRequestError) as raised:
        Client("http://test", api_key="s3cret\n")
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_the_same_however_the_bytes_are_cut(size: int) -> None:
    texts = ["a", "line\u2028separator\x85", "é" * 5, ""]
    stream = ": ping\r\n\r\n" + "".join(
        f"event: x\ndata: {json.dumps({'text': text}, ensure_ascii=False)}\n\n" for text in texts
    )
    raw, parser = (stream + "data: [DONE]\r\n\r\n").encode(), EventParser()
    pieces = [raw[i : i + size] for i in range(0, len(raw), size)]
    assert [e["text"] for piece in pieces for e in parser.feed(piece)] == texts
    assert parser.done
    parser.finish()


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_") and name not in ("close", "aclose")
        }

    assert public(Client) == public(AsyncClient)


@pytest.fixture(scope="module")
def live(tiny_llama_dir: Path) -> Iterator[Live]:
    """A server of the tiny Llama."""
    with live_server(tiny_llama_dir) as server:
        yield server


def test_real_server_answers_as_the_official_client_says(live: Live) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0}
    expected = live.openai.completions.create(
        model=live.model, prompt=PROMPT, logprobs=1, **options
    )
    with Client(f"{live.url}/v1") as client:
        answer = client.complete(PROMPT, logprobs=1, **options)
        assert answer.text == expected.choices[0].text
        assert expected.usage is not None
        assert answer.prompt_tokens == expected.usage.prompt_tokens
        scored, wanted = answer.choices[0].logprobs, expected.choices[0].logprobs
        assert scored is not None
        assert wanted is not None
        assert list(scored.tokens) == wanted.tokens
        assert list(scored.text_offset) == wanted.text_offset
        assert answer.ttt is not None

        pieces = list(client.stream(PROMPT, ttt={"gate": "off"}, **options))
        assert "".join(piece.text for piece in pieces) == answer.text
        assert pieces[-1].completion_tokens == answer.completion_tokens
        assert pieces[-1].ttt is not None
        assert [piece.seconds for piece in pieces] == sorted(piece.seconds for piece in pieces)

        messages = [{"role": "user", "content": "hello"}]
        chat = client.chat(messages, **options)
        assert "".join(p.text for p in client.stream_chat(messages, **options)) == chat.text

        assert client.models() == [live.model]
        assert client.context_length() == 512
        assert client.server_settings()["server.rule.learning_rate"] == 0.01
        assert (client.version() or "").startswith("PonderTTT ")
        assert client.tokenize(PROMPT) == live.core.tokenizer.encode(PROMPT)


def test_real_server_keeps_sessions_and_teaches_them(live: Live) -> None:
    async def main() -> None:
        async with AsyncClient(live.url) as client:
            made = await client.create_session("async", gate="fixed", chunk_size=32)
            assert (made["id"], made["gate"]) == ("async", "fixed")
            documents = [{"path": "a.py", "text": PROMPT * 4}]
            events = [e async for e in client.adapt("async", documents, {"budget": 6.0})]
            assert events[-1]["object"] == "session.adaptation"
            assert events[-1]["version_after"] > 0
            await client.fork("async", "copy")
            names = {session["id"] for session in await client.sessions()}
            assert {"async", "copy"} <= names
            await client.delete_session("copy")
            assert await client.session("copy") is None
            state = await client.session("async")
            assert state is not None
            assert state["version"] == events[-1]["version_after"]

    asyncio.run(main())


def test_server_that_asks_for_short_waits_again_and_again_is_given_longer_ones() -> None:
    backoff = Backoff(retries=10, first=0.5)
    busy = httpx.Response(429, headers={"Retry-After": "1"})
    waits = [backoff.again(busy, attempt) or 0.0 for attempt in range(10)]
    assert waits[0] == 1.0
    assert all(wait <= 60.0 for wait in waits)
    assert sum(waits) > 120.0
    patient = httpx.Response(503, headers={"Retry-After": "30"})
    assert backoff.again(patient, 0) == 30.0


def test_password_in_the_address_is_used_but_not_shown() -> None:
    seen: list[str | None] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("Authorization"))
        return httpx.Response(200, json={"object": "list", "data": [{"id": "m"}]})

    transport = httpx.MockTransport(handler)
    with Client("http://user:sekret@localhost:8000/v1", transport=transport) as client:
        assert client.base_url == "http://localhost:8000"
        assert client.models() == ["m"]
    (header,) = seen
    assert header is not None
    assert header.startswith("Basic ")


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_address_that_is_none_is_a_clear_error(kind: type[Client] | type[AsyncClient]) -> None:
    with pytest.raises(UnreachableError, match=r"localhost:80a0 \(Invalid port") as raised:
        kind("http://user:sekret@localhost:80a0")
    assert "sekret" not in str(raised.value)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_version_of_a_busy_server_is_not_unknown(call: Caller, status: int) -> None:
    with pytest.raises(ServerError, match=str(status)):
        call(lambda _: httpx.Response(status), "version")


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(404),
        httpx.Response(401, json={"detail": "only /v1"}),
        httpx.Response(302, headers={"Location": "/login"}),
        httpx.Response(200, html="<b>Hello</b>"),
        httpx.Response(501),
    ],
)
def test_version_is_unknown_where_there_is_no_route(call: Caller, answer: httpx.Response) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(answer.status_code, content=answer.content, headers=answer.headers)

    assert call(handler, "version") is None


@pytest.mark.parametrize("progress", [[None, 3], [1], "half", [1, "all"], None])
def test_progress_that_is_no_progress_is_passed_on(call: Caller, progress: object) -> None:
    events = [CHUNK | {"progress": progress}, REPORT]
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    assert call(lambda _: httpx.Response(200, text=text), "adapt", "s", [], {}) == events


def test_lesson_without_a_report_is_no_whole_answer(call: Caller) -> None:
    text = f"data: {json.dumps(CHUNK)}\n\ndata: [DONE]\n\n"
    with pytest.raises(BrokenAnswerError, match="without a report"):
        call(lambda _: httpx.Response(200, text=text), "adapt", "s", [], {})


def test_session_of_another_form_is_named(call: Caller) -> None:
    with pytest.raises(AnswerError, match=r"session\.version is 'x'"):
        call(lambda _: httpx.Response(200, json={"id": "s", "version": "x"}), "session", "s")
