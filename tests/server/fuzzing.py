"""Requests made up from the OpenAPI document, sent to the application in this process.

`benchmarks/fuzz_api.py` sends many thousands of them, `test_fuzz.py` a few hundred.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.core.result import Ok

from ponderttt.engine.async_engine import AsyncEngine
from ponderttt.engine.loading import load_core
from server.app import create_app
from server.engine_config import engine_config
from server.keys import digest_of
from server.settings import Settings

KEYS = {"alice": "ponder-a", "bob": "ponder-b", "root": "ponder-r"}
#: Alice's; requests that name a session name one of these in two of three cases.
SESSIONS = ("my-repo", "other")

#: Headers that no client of ours sends. Bytes above 127 are allowed on the wire.
ODD_HEADERS = st.lists(
    st.tuples(
        st.sampled_from([
            b"authorization", b"x-request-id", b"content-type", b"content-length", b"host",
            b"accept", b"expect", b"transfer-encoding", b"cookie", b"x-forwarded-for",
        ]),
        st.one_of(
            st.binary(max_size=64),
            st.sampled_from([
                b"", b"Bearer", b"Bearer ", b"bearer ponder-a", b"Bearer " + b"k" * 5000, b"[",
                b"Basic YWxpY2U6", b"Bearer \xff\xfe\xc3", b"application/json; charset=x", b"\xb2",
                b"-1", b"9" * 40, b"100-continue", b"[::1", b"a\nb", b"a\x00b",
            ]),
        ),
    ),
    min_size=1,
    max_size=6,
)  # fmt: skip


@dataclass
class Tally:
    """What came of the requests.

    Args:
        statuses: requests by operation and status.
        failures: those that no server should give, with what was sent.
    """

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """All of them."""
        return self.statuses.total()

    def take(self, operation: str, sent: object, answer: httpx.Response) -> None:
        """Enter one request."""
        self.statuses[operation, answer.status_code] += 1
        if problem := _problem(answer):
            self.failures.append(f"{operation}: {problem}\n  sent: {str(sent)[:2000]}")


def _problem(answer: httpx.Response) -> str | None:
    if answer.status_code >= 500:
        return f"{answer.status_code} {answer.text[:500]}"
    if "x-request-id" not in answer.headers:
        return "no X-Request-Id"
    if answer.status_code < 400:
        return None
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError):
        return f"{answer.status_code} without an error in OpenAI's shape: {answer.text[:500]}"
    if set(error) != {"message", "type", "param", "code"} or not error["message"]:
        return f"an error that lacks something: {error}"
    return None


class App:
    """The application with a tiny model, in an event loop of its own thread."""

    def __init__(self, directory: Path, key_file: Path) -> None:
        entries = [
            f'[keys.{name}]\nsha256 = "{digest_of(key.encode()).hex()}"\n'
            f'scopes = ["{"admin" if name == "root" else "completions"}"]\n'
            for name, key in KEYS.items()
        ]
        key_file.write_text("\n".join(entries))
        options = Settings(
            model=str(directory),
            measure_costs=False,
            api_key_file=key_file,
            max_model_len=96,
            max_sessions=2000,
            drain_seconds=5.0,
        )
        self.engine = AsyncEngine(load_core(options.model, config=engine_config(options)))
        self.app = create_app(self.engine, options)
        self.document: dict[str, Any] = json.loads(json.dumps(self.app.openapi()))
        self.loop = asyncio.new_event_loop()
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=120
        )

    def send(
        self, method: str, url: str, headers: list[tuple[bytes, bytes]], **content: Any
    ) -> httpx.Response:
        """One request and its whole answer."""
        request = httpx.Request(method, f"http://test{url}", **content)
        # As they are: httpx would tidy them up.
        given = {name for name, _ in headers}
        raw = [(name.lower(), value) for name, value in request.headers.raw]
        request.headers = httpx.Headers([*((n, v) for n, v in raw if n not in given), *headers])
        future = asyncio.run_coroutine_threadsafe(self.client.send(request), self.loop)
        return future.result(timeout=120)


@contextmanager
def running_app(directory: Path, key_file: Path) -> Iterator[App]:
    """The application while the block runs."""
    app = App(directory, key_file)
    stop = asyncio.Event()
    ready = threading.Event()

    async def live() -> None:
        async with app.app.router.lifespan_context(app.app):
            ready.set()
            await stop.wait()
        await app.client.aclose()
        # A library waits for signals in a task of its own, for ever.
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    thread = threading.Thread(target=app.loop.run_until_complete, args=(live(),))
    thread.start()
    try:
        assert ready.wait(60)
        for name in SESSIONS:
            app.send("POST", "/v1/sessions", _key("alice"), json={"id": name})
        yield app
        assert app.engine.failure is None, "the engine has died"
    finally:
        app.loop.call_soon_threadsafe(stop.set)
        thread.join()
        app.loop.close()


def _key(name: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", f"Bearer {KEYS[name]}".encode())]


def fuzz(app: App, requests: int, seed_: int, tally: Tally) -> None:
    """Send about so many requests to every operation, in all fitting the document in half of them.

    Args:
        app: to send them to.
        requests: at least.
        seed_: of all draws.
        tally: takes what comes of them.
    """
    schema = schemathesis.openapi.from_dict(app.document)
    operations = [each.ok() for each in schema.get_all_operations() if isinstance(each, Ok)]
    assert len(operations) == sum(len(methods) for methods in app.document["paths"].values())
    # Operations without a body have few forms.
    shares = {op.label: 4 if op.body else 1 for op in operations}
    each = requests / sum(shares.values())
    goal, round_ = tally.requests + requests, 0
    while tally.requests < goal:
        for operation in operations:
            for mode in GenerationMode:
                examples = max(round(each * shares[operation.label] / 2), 1)
                strategy = operation.as_strategy(generation_mode=mode)
                _send_examples(app, strategy, examples, seed_ + round_, tally)
        round_ += 1


def _send_examples(
    app: App, strategy: st.SearchStrategy[Case[Any]], examples: int, seed_: int, tally: Tally
) -> None:
    @seed(seed_)
    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy, st.data())
    def run(case: Case[Any], data: st.DataObject) -> None:
        label = case.operation.label
        _name_sessions(case, data)
        headers = _key(data.draw(st.sampled_from(("alice", "alice", "bob", "root"))))
        if data.draw(st.sampled_from(range(8))) == 5:
            odd = data.draw(ODD_HEADERS)
            headers = odd if any(name == b"authorization" for name, _ in odd) else headers + odd
        kwargs = case.as_transport_kwargs(base_url="")
        content = {name: kwargs[name] for name in ("json", "params", "data") if kwargs.get(name)}
        if isinstance(content.get("data"), bytes | str):
            content["content"] = content.pop("data")
        given = {name.lower(): value for name, value in (kwargs.get("headers") or {}).items()}
        if "content-type" in given and not any(name == b"content-type" for name, _ in headers):
            headers = [*headers, (b"content-type", str(given["content-type"]).encode())]
        url = httpx.URL("http://localhost").join(kwargs["url"]).raw_path.decode()
        answer = app.send(kwargs["method"], url, headers, **content)
        tally.take(label, (kwargs["method"], url, headers, content), answer)

    # Nothing fits where every value would be a right one.
    try:
        run()
    except Exception as error:
        if type(error).__name__ not in ("Unsatisfiable", "SkipTest"):
            raise


def _name_sessions(case: Case[Any], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from((*SESSIONS, "alice~my-repo", None, None)))
    if name is None:
        return
    if "session_id" in (case.path_parameters or {}) and case.method != "DELETE":
        case.path_parameters["session_id"] = name
    ttt = case.body.get("ttt") if isinstance(case.body, dict) else None
    if isinstance(ttt, dict):
        ttt["session"] = name
