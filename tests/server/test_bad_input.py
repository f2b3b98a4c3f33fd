"""Nothing that a client sends brings the server down, or changes a session."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from ponderttt.errors import InvalidRequestError
from server.body import parse_json
from tests.helpers import source_text
from tests.server.live import PROMPT, Live

COMPLETIONS, CHAT, SESSIONS = "/v1/completions", "/v1/chat/completions", "/v1/sessions"
ADAPT = "/v1/sessions/{session}/adapt"
USER = [{"role": "user", "content": "hi"}]
TEXT = [{"path": "a.py", "text": "x = 1"}]

# Fields of both completion calls: value, the field that is named, what the message tells.
SAMPLING: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": -1}, "max_tokens", "0"),
    ({"max_tokens": 1.5}, "max_tokens", "1.5"),
    ({"max_tokens": "16"}, "max_tokens", "'16'"),
    ({"max_tokens": True}, "max_tokens", "True"),
    ({"max_tokens": 10**30}, "max_tokens", "512"),
    ({"max_tokens": 512}, "max_tokens", "512"),
    ({"temperature": -0.1}, "temperature", "0"),
    ({"temperature": 2.1}, "temperature", "2"),
    ({"temperature": "hot"}, "temperature", "'hot'"),
    ({"top_p": 0}, "top_p", "0"),
    ({"top_p": 1.01}, "top_p", "1"),
    ({"top_k": -2}, "top_k", "-1"),
    ({"min_p": 2}, "min_p", "1"),
    ({"n": 0}, "n", "1"),
    ({"n": 17}, "n", "16"),
    ({"seed": 2**63}, "seed", str(2**63)),
    ({"seed": "abc"}, "seed", "integer"),
    ({"stop": ""}, "stop", "1"),
    ({"stop": ["a"] * 17}, "stop", "16"),
    ({"stop": ["a", 1]}, "stop", "list of strings"),
    ({"stop": "x" * 1001}, "stop", "1000"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]", "integer"),
    ({"stop_token_ids": [512]}, "stop_token_ids", "511"),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids", "128"),
    ({"presence_penalty": 2.5}, "presence_penalty", "2"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "-2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "0"),
    ({"repetition_penalty": 11}, "repetition_penalty", "10"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "100"),
    ({"logit_bias": {"99999": 1}}, "logit_bias.99999", "511"),
    ({"logit_bias": {"five": 1}}, "logit_bias", "'five'"),
    ({"logit_bias": [5]}, "logit_bias", "object"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"usage": 1}}, "stream_options.usage", "unknown"),
    ({"temprature": 1}, "temprature", "unknown"),
    ({"model": 5}, "model", "string"),
    ({"ttt": "on"}, "ttt", "object"),
    ({"ttt": {"sesion": "a"}}, "ttt.sesion", "unknown"),
    ({"ttt": {"session": 5}}, "ttt.session", "string"),
    ({"ttt": {"gate": "magic"}}, "ttt.gate", "threshold"),
    ({"ttt": {"gate": "policy"}}, "ttt.gate", "--policy"),
    ({"ttt": {"gate": "threshold", "action": "UPDATE_1"}}, "ttt.action", "fixed"),
    ({"ttt": {"action": "UPDATE_3"}}, "ttt.action", "UPDATE_4"),
    ({"ttt": {"budget": -1}}, "ttt.budget", "1"),
    ({"ttt": {"budget": 12.5}}, "ttt.budget", "12"),
    ({"ttt": {"budget": "2"}}, "ttt.budget", "number"),
    ({"ttt": {"cost_model": "euro"}}, "ttt.cost_model", "measured"),
    ({"ttt": {"chunk_size": 15}}, "ttt.chunk_size", "16"),
    ({"ttt": {"chunk_size": 2049}}, "ttt.chunk_size", "2048"),
    ({"ttt": {"adapt_on": "everything"}}, "ttt.adapt_on", "generated"),
    ({"ttt": {"when": "later"}}, "ttt.when", "background"),
    ({"ttt": {"when": "background"}}, "ttt.when", "session"),
    ({"ttt": {"seed": -1}}, "ttt.seed", "0"),
    ({"n": 2, "ttt": {"gate": "fixed", "adapt_on": "both"}}, "n", "n = 1"),
]

# Path, body, the field that is named, what the message tells; all of status 400.
OTHERS: list[tuple[str, Any, str, str]] = [
    (COMPLETIONS, {}, "prompt", "missing"),
    (COMPLETIONS, {"prompt": None}, "prompt", "a string"),
    (COMPLETIONS, {"prompt": ""}, "prompt", "empty"),
    (COMPLETIONS, {"prompt": []}, "prompt", "empty"),
    (COMPLETIONS, {"prompt": ["a", ""]}, "prompt[1]", "empty"),
    (COMPLETIONS, {"prompt": [[1], []]}, "prompt[1]", "empty"),
    (COMPLETIONS, {"prompt": ["a", 1]}, "prompt", "list of token ids"),
    (COMPLETIONS, {"prompt": [512]}, "prompt", "511"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt", "511"),
    (COMPLETIONS, {"prompt": [10**20]}, "prompt", "511"),
    (COMPLETIONS, {"prompt": [[1, 2], [3, 512]]}, "prompt[1]", "511"),
    (COMPLETIONS, {"prompt": ["a"] * 257}, "prompt", "256"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix", "fill-in-the-middle"),
    (COMPLETIONS, {"prompt": [1], "suffix": "b"}, "suffix", "text"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b", "echo": True}, "echo", "suffix"),
    (COMPLETIONS, {"prompt": "a", "best_of": 2}, "best_of", "n = 1"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs", "20"),
    (COMPLETIONS, {"prompt": "a", "logprobs": True}, "logprobs", "integer"),
    (COMPLETIONS, [], "body", "object"),
    (COMPLETIONS, "text", "body", "object"),
    (CHAT, {}, "messages", "missing"),
    (CHAT, {"messages": []}, "messages", "at least 1"),
    (CHAT, {"messages": "hi"}, "messages", "list"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
    (CHAT, {"messages": [{"role": "boss", "content": "a"}]}, "messages[0].role", "assistant"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content",
        "text",
    ),
    (CHAT, {"messages": USER * 4097}, "messages", "4096"),
    (CHAT, {"messages": USER, "logprobs": 1}, "logprobs", "boolean"),
    (CHAT, {"messages": USER, "top_logprobs": 1}, "top_logprobs", "logprobs"),
    (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    (CHAT, {"messages": USER, "tools": [{"type": "function"}]}, "tools", "not supported"),
    (CHAT, {"messages": USER, "response_format": {"type": "json"}}, "response_format", "text"),
    (CHAT, {"messages": USER, "max_completion_tokens": 600}, "max_completion_tokens", "512"),
    (CHAT, {"messages": USER, "suffix": "a"}, "suffix", "unknown"),
    (SESSIONS, {"id": ""}, "id", "128"),
    (SESSIONS, {"id": "a" * 129}, "id", "128"),
    (SESSIONS, {"id": "../etc"}, "id", "letters"),
    (SESSIONS, {"id": 5}, "id", "string"),
    (SESSIONS, {"budget": -2}, "budget", "1"),
    (SESSIONS, {"budget": 13}, "budget", "12"),
    (SESSIONS, {"gate": "magic"}, "gate", "threshold"),
    (SESSIONS, {"gate": "off", "action": "SKIP"}, "action", "fixed"),
    (SESSIONS, {"chunk_size": 1}, "chunk_size", "16"),
    (SESSIONS, {"colour": "red"}, "colour", "unknown"),
    (ADAPT, {}, "documents", "missing"),
    (ADAPT, {"documents": []}, "documents", "at least 1"),
    (ADAPT, {"documents": [{"text": "a"}] * 10_001}, "documents", "10000"),
    (ADAPT, {"documents": [{"path": "a"}]}, "documents[0].text", "missing"),
    (ADAPT, {"documents": [*TEXT, {"text": ""}]}, "documents[1].text", "at least 1"),
    (ADAPT, {"documents": [{"text": 5}]}, "documents[0].text", "string"),
    (ADAPT, {"documents": TEXT, "budget": -1}, "budget", "1"),
    (ADAPT, {"documents": TEXT, "gate": "policy"}, "gate", "--policy"),
    (ADAPT, {"documents": TEXT, "gate": "off", "action": "SKIP"}, "action", "fixed"),
    (ADAPT, {"documents": TEXT, "chunk_size": 4096}, "chunk_size", "2048"),
    (ADAPT, {"documents": TEXT, "when": "background"}, "when", "unknown"),
    ("/v1/sessions/{session}/fork", {"id": "a b"}, "id", "letters"),
    ("/tokenize", {}, "prompt", "messages"),
    ("/tokenize", {"prompt": "a", "messages": USER}, "prompt", "either"),
    ("/tokenize", {"prompt": 5}, "prompt", "string"),
    ("/detokenize", {"tokens": [512]}, "tokens", "511"),
    ("/detokenize", {"tokens": [-1]}, "tokens", "511"),
    ("/detokenize", {"tokens": "abc"}, "tokens", "list"),
]  # fmt: skip

# Bodies that are wrong wherever they are sent, and what the message tells.
SYNTAX: list[tuple[bytes, str]] = [
    (b"{", "line 1"),
    (b'{"prompt": "a"} x', "JSON"),
    (b'{"prompt": "\xff\xfe"}', "byte 12"),
    (b'{"prompt": "a", "temperature": NaN}', "NaN"),
    (b'{"prompt": "a", "temperature": -Infinity}', "-Infinity"),
    (b'{"prompt": "a", "ttt": {"session": "SESSION", "budget": NaN}}', "NaN"),
    (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "an integer of more than 4300 digits"),
    (b'{"prompt": "\\ud800"}', "surrogate"),
    (b'{"documents": [{"text": "a\\udfff"}]}', "documents: character 1 of"),
    (b'{"prompt": ["a", "x\\udfff"]}', "prompt: character 1 of"),
    (b'{"\\ud800": 1, "prompt": "a"}', "surrogate"),
    (b'{"\\ud800": "\\ud800", "prompt": "a"}', "surrogate"),
    (json.dumps({str(i): 1 for i in range(4097)}).encode(), "4096"),
    (b"[" * 100_000, "deep"),
    (b"\xef\xbb\xbf{}", "JSON"),
]

# Numbers that JSON allows and floating point does not hold; and nothing at all.
VALUES: list[tuple[bytes, str]] = [
    (b"", "required"),
    (b'{"prompt": "a", "temperature": 1e999}', "finite"),
    (b'{"prompt": "a", "ttt": {"session": "SESSION", "budget": 1e999}}', "finite"),
    (b'{"prompt": "a", "ttt": {"session": "SESSION", "budget": -1e999}}', "finite"),
]


@pytest.fixture(scope="module")
def taught(live: Live) -> str:
    """A session that knows something and would like to learn more."""
    name = live.new_session(gate="fixed", chunk_size=32)
    live.adapt(name, source_text()[:600])
    assert live.session(name)["version"] > 0
    return name


@pytest.fixture(autouse=True)
def nothing_changes(live: Live, taught: str) -> Iterator[None]:
    """Whatever is refused leaves sessions and server as they were."""
    before, sessions = live.session(taught), _names(live)
    yield
    assert live.session(taught) == before
    assert _names(live) == sessions
    assert live.http.get("/ready").status_code == 200


def _names(live: Live) -> list[str]:
    return [each["id"] for each in live.http.get(SESSIONS).json()["data"]]


def check(answer: Any, status: int, param: str | None, tells: str) -> None:
    """An error in OpenAI's shape that names the field and tells what it should."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert tells in error["message"]
    if param is not None and status == 400:
        assert error["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(("field", "param", "tells"), SAMPLING, ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_completion_field_out_of_range_is_refused(
    live: Live, taught: str, path: str, field: dict[str, Any], param: str, tells: str
) -> None:
    body: dict[str, Any] = {"ttt": {"session": taught}} | field
    body |= {"prompt": PROMPT} if path == COMPLETIONS else {"messages": USER}
    check(live.http.post(path, json=body), 400, param, tells)


@pytest.mark.parametrize(("path", "body", "param", "tells"), OTHERS, ids=lambda v: str(v)[:40])
def test_field_out_of_range_is_refused(
    live: Live, taught: str, path: str, body: Any, param: str, tells: str
) -> None:
    if path == COMPLETIONS and isinstance(body, dict):
        body = {"ttt": {"session": taught}} | body
    check(live.http.post(path.format(session=taught), json=body), 400, param, tells)


@pytest.mark.parametrize(
    ("path", "raw", "tells"),
    [(path, *case) for path in (COMPLETIONS, ADAPT) for case in SYNTAX]
    + [(COMPLETIONS, *case) for case in VALUES],
    ids=lambda v: str(v)[:40],
)
def test_body_that_is_no_good_json_is_refused(
    live: Live, taught: str, path: str, raw: bytes, tells: str
) -> None:
    answer = live.http.post(
        path.format(session=taught),
        content=raw.replace(b"SESSION", taught.encode()),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 400, answer.text
    assert tells in answer.json()["error"]["message"]


def test_prompt_beyond_the_context_is_too_long(live: Live, taught: str) -> None:
    body = {"prompt": "x y " * 2000, "max_tokens": 1, "ttt": {"session": taught}}
    answer = live.http.post(COMPLETIONS, json=body)
    check(answer, 413, "prompt", "512")
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert "/adapt" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": ["a", "x y " * 40_000]}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "x y " * 40_000}]}, "messages"),
    ],
    ids=["texts", "chat"],
)
def test_prompt_of_more_bytes_than_the_context_holds_is_refused_without_encoding(
    live: Live, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], param: str
) -> None:
    def encode(*_: Any) -> list[int]:
        raise AssertionError("encoded")

    monkeypatch.setattr(live.core.tokenizer, "encode", encode)
    monkeypatch.setattr(live.core.tokenizer, "apply_chat_template", encode)
    answer = live.http.post(path, json=body)
    check(answer, 413, param, f"160000 bytes exceed {512 * 256}")
    assert "512 tokens" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": [1] * 500_000 + [1.5]}),
        (COMPLETIONS, {"prompt": "a", "stop": [1] * 500_000}),
        (COMPLETIONS, {"prompt": "a", "stop_token_ids": ["a"] * 400_000}),
        (COMPLETIONS, {"prompt": "a"} | {f"key{i}": 1 for i in range(150_000)}),
        (CHAT, {"messages": [1] * 500_000}),
        (CHAT, {"messages": [{"role": "user", "content": [1] * 500_000}]}),
        (ADAPT, {"documents": [1] * 500_000}),
    ],
    ids=["ids", "stop", "stop_token_ids", "keys", "messages", "parts", "documents"],
)
def test_megabytes_of_wrong_items_do_not_keep_the_server_from_answering(
    live: Live, taught: str, path: str, body: dict[str, Any]
) -> None:
    longest = 0.0
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(live.http.post, path.format(session=taught), json=body)
        while not refused.done():
            begun = time.monotonic()
            assert httpx.get(f"{live.url}/health", trust_env=False).status_code == 200
            longest = max(longest, time.monotonic() - begun)
    assert refused.result().status_code == 400
    assert longest < 1


def test_surrogate_below_a_long_key_is_refused_without_a_path_per_item() -> None:
    body = json.dumps({"documents": {"k" * 100_000: ["a"] * 20_000 + ["b\ud800"]}}).encode()
    tracemalloc.start()
    with pytest.raises(InvalidRequestError, match="surrogate") as caught:
        parse_json(body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
    assert caught.value.param == "documents"


def test_value_that_an_error_echoes_is_cut_short(live: Live) -> None:
    error = live.http.post(COMPLETIONS, json={"prompt": "a", "x" * 100_000: 1}).json()["error"]
    assert len(error["message"]) <= 500
    assert len(error["param"]) <= 200
    assert error["message"].endswith("see /docs for its spelling")


def test_new_tokens_beyond_the_room_name_both_limits(live: Live) -> None:
    length = len(live.core.tokenizer.encode(PROMPT))
    with pytest.raises(openai.BadRequestError) as caught:
        live.openai.completions.create(model=live.model, prompt=PROMPT, max_tokens=500)
    for number in (500, length, 512, 512 - length):
        assert str(number) in caught.value.message


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/sessions/nobody"),
        ("DELETE", "/v1/sessions/nobody"),
        ("GET", "/v1/sessions/nobody/adapter"),
        ("GET", "/v1/sessions/%F0%28%8C%28"),
        ("GET", "/v1/sessions/..%2F..%2Fetc"),
        ("GET", "/v1/models/gpt-4"),
        ("GET", "/v1/models/a/b"),
        ("GET", "/v2/completions"),
    ],
)
def test_unknown_thing_is_not_found(live: Live, method: str, path: str) -> None:
    answer = live.http.request(method, path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("path", "body"), [("adapt", {"documents": TEXT}), ("fork", {"id": "copy"})]
)
def test_unknown_session_can_not_be_taught_or_forked(
    live: Live, path: str, body: dict[str, Any]
) -> None:
    answer = live.http.post(f"/v1/sessions/nobody/{path}", json=body)
    check(answer, 404, "session", "nobody")


def test_wrong_method_is_not_allowed(live: Live) -> None:
    answer = live.http.get(COMPLETIONS)
    check(answer, 405, None, "/docs")
    assert answer.headers["Allow"] == "POST"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_body_of_another_type_is_refused(live: Live, content_type: str) -> None:
    answer = live.http.post(
        COMPLETIONS, content=b'{"prompt": "a"}', headers={"Content-Type": content_type}
    )
    check(answer, 415, None, "application/json")


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("path", [COMPLETIONS, ADAPT, "/v1/models"])
def test_body_of_ten_megabytes_is_too_large(
    live: Live, taught: str, declared: bool, path: str
) -> None:
    body = json.dumps({"documents": [{"text": "a" * 10_000_000}]}).encode()

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 1 << 16):
            yield body[start : start + (1 << 16)]

    answer = live.http.post(
        path.format(session=taught),
        content=body if declared else pieces(),
        headers={"Content-Type": "application/json"},
    )
    if path == "/v1/models" and not declared:
        # Nobody reads it, so nobody counts it.
        assert answer.status_code == 405
        return
    check(answer, 413, None, str(8 * 1024 * 1024))


def test_fields_that_openai_clients_send_are_ignored(live: Live) -> None:
    completion = live.openai.completions.create(
        model=live.model, prompt=PROMPT, max_tokens=1, user="me", best_of=1
    )
    assert len(completion.choices) == 1
    chat = live.openai.chat.completions.create(
        model=live.model,
        messages=[
            {"role": "user", "content": "hi", "name": "me"},
            {"role": "assistant", "content": "ho", "refusal": None, "tool_calls": []},
            {"role": "user", "content": "hi"},
        ],
        max_tokens=1,
        user="me",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        response_format={"type": "text"},
        tools=[],
        tool_choice="none",
        parallel_tool_calls=False,
    )
    assert len(chat.choices) == 1
