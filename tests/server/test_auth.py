"""API keys at the door: who may come in, and whose sessions are whose."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ponderttt.errors import InvalidRequestError, PonderError
from server.app import create_app
from server.auth import OPEN, check_exposure
from server.keys import digest_of
from server.runner import bind
from server.settings import Settings
from tests.server.live import PROMPT, Live, live_server

KEYS = {
    "alice": 'scopes = ["completions"]',
    "bob": 'scopes = ["completions"]',
    "few": 'scopes = ["completions"]\nmax_sessions = 2\nmax_waiting = 3',
    "ops": 'scopes = ["metrics"]',
    "root": 'scopes = ["admin"]',
}
Keyed = dict[str, httpx.Client]


def key_file(directory: Path, *names: str) -> Path:
    """A file in which the key of NAME is `key-of-NAME`."""
    path = directory / "keys.toml"
    path.write_text("".join(
        f'[keys.{name}]\nsha256 = "{digest_of(f"key-of-{name}".encode()).hex()}"\n{KEYS[name]}\n'
        for name in names
    ))  # fmt: skip
    return path


def bearer_of(name: str) -> dict[str, str]:
    """The header with the key of NAME."""
    return {"Authorization": f"Bearer key-of-{name}"}


@pytest.fixture(scope="module")
def guarded(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with a key for everybody in `KEYS`."""
    path = key_file(tmp_path_factory.mktemp("keys"), *KEYS)
    with live_server(tiny_llama_dir, api_key_file=path, max_sessions=100) as server:
        yield server


@pytest.fixture(scope="module")
def keyed(guarded: Live) -> Iterator[Keyed]:
    """A client for each key."""
    clients = {
        name: httpx.Client(base_url=guarded.url, timeout=60, headers=bearer_of(name))
        for name in KEYS
    }
    yield clients
    for client in clients.values():
        client.close()


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# --- the door -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(OPEN - {"/docs/oauth2-redirect"}))
def test_open_paths_need_no_key(guarded: Live, path: str) -> None:
    assert guarded.http.get(path).status_code in (200, 307)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"),
        ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/v1/sessions"),
        ("POST", "/v1/sessions"), ("GET", "/v1/sessions/a"), ("DELETE", "/v1/sessions/a"),
        ("POST", "/v1/sessions/a/adapt"), ("POST", "/v1/sessions/a/fork"),
        ("GET", "/v1/sessions/a/adapter"), ("GET", "/metrics"), ("GET", "/no/such/path"),
        ("GET", "//health"), ("GET", "/health/"), ("GET", "/docs/x"), ("GET", "/METRICS"),
    ],
)  # fmt: skip
def test_everything_else_needs_one(guarded: Live, method: str, path: str) -> None:
    error = error_of(answer := guarded.http.request(method, f"{guarded.url}{path}"), 401)
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="ponderttt"'
    assert error["code"] == "invalid_api_key"
    assert "Authorization: Bearer" in error["message"]


@pytest.mark.parametrize(
    "values",
    [
        [b"Bearer wrong"], [b"Bearer"], [b"key-of-alice"], [b"Basic a2V5LW9mLWFsaWNl"],
        [b"Bearer key-of-alice x"], [b"Bearer \xff\xfe\xfd"], [b"Bearer " + b"k" * 30_000],
        [b"Bearer key-of-alice", b"Bearer key-of-alice"], [b"Bearer key-of-alice", b"Bearer x"],
        [b"Bearer " + digest_of(b"key-of-alice").hex().encode()], [b""], [b"Bearer KEY-OF-ALICE"],
    ],
)  # fmt: skip
def test_wrong_or_odd_keys_are_401_and_are_not_repeated(guarded: Live, values: list[bytes]) -> None:
    headers = [(b"Authorization", value) for value in values]
    answer = httpx.get(f"{guarded.url}/v1/models", headers=headers)
    error_of(answer, 401)
    assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]
    assert "key-of-alice" not in answer.text


def test_refused_before_the_body_is_read(guarded: Live) -> None:
    """Nobody without a key makes the server wait for, or parse, a body."""
    host, port = guarded.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        "Content-Length: 1000000\r\n\r\n{"
    )
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 401")


def test_openai_client_with_its_key_is_served_and_without_it_told_so(guarded: Live) -> None:
    for key in ("key-of-alice", "key-of-root"):
        with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0) as client:
            answer = client.completions.create(model=guarded.model, prompt=PROMPT, max_tokens=2)
            assert answer.usage is not None
    with (
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="not known"),
    ):
        client.models.list()


def test_scopes_say_what_a_key_opens(keyed: Keyed) -> None:
    assert keyed["ops"].get("/metrics").status_code == 200
    assert keyed["root"].get("/metrics").status_code == 200
    for name, path, scope in (
        ("alice", "/metrics", "metrics"),
        ("ops", "/v1/models", "completions"),
    ):
        error = error_of(answer := keyed[name].get(path), 403)
        assert error["type"] == "permission_error"
        assert f"'{scope}'" in error["message"]
        assert 'error="insufficient_scope"' in answer.headers["WWW-Authenticate"]


def test_key_that_is_taken_out_of_the_file_no_longer_opens(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    path = key_file(tmp_path, "alice", "bob")
    with live_server(tiny_llama_dir, api_key_file=path) as live:
        bob = {"Authorization": "Bearer key-of-bob"}
        assert live.http.get("/v1/models", headers=bob).status_code == 200
        key_file(tmp_path, "alice")
        until = time.monotonic() + 10
        while live.http.get("/v1/models", headers=bob).status_code != 401:
            assert time.monotonic() < until
            time.sleep(0.1)


def test_wrong_key_file_keeps_the_server_from_starting(live: Live, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    with pytest.raises(InvalidRequestError, match="keys new"):
        create_app(live.engine, Settings(api_key_file=path))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.8.8"])
def test_loopback_needs_no_keys(host: str) -> None:
    with bind(host, 0) as sock:
        check_exposure(sock, Settings())


def test_other_addresses_need_keys_or_a_word(tmp_path: Path) -> None:
    with bind("0.0.0.0", 0) as sock:
        with pytest.raises(PonderError, match=r"--api-key-file.*--allow-unauthenticated"):
            check_exposure(sock, Settings())
        check_exposure(sock, Settings(allow_unauthenticated=True))
        check_exposure(sock, Settings(api_key_file=key_file(tmp_path, "alice")))


# --- sessions -------------------------------------------------------------------------------


def calls(name: str) -> list[tuple[str, str, dict[str, Any] | None]]:
    """Every way to name a session."""
    documents = {"documents": [{"text": PROMPT}]}
    ttt = {"prompt": PROMPT, "max_tokens": 1, "ttt": {"session": name}}
    chat = {"messages": [{"role": "user", "content": "a"}], "ttt": {"session": name}}
    return [
        ("GET", f"/v1/sessions/{name}", None),
        ("DELETE", f"/v1/sessions/{name}", None),
        ("POST", f"/v1/sessions/{name}/adapt", documents),
        ("POST", f"/v1/sessions/{name}/adapt", documents | {"stream": True}),
        ("POST", f"/v1/sessions/{name}/fork", {"id": "copy"}),
        ("POST", f"/v1/sessions/{name}/fork", None),
        ("GET", f"/v1/sessions/{name}/adapter", None),
        ("POST", "/v1/completions", ttt),
        ("POST", "/v1/completions", ttt | {"stream": True}),
        ("POST", "/v1/chat/completions", chat),
    ]


def test_session_of_another_key_is_exactly_as_if_it_did_not_exist(keyed: Keyed) -> None:
    for name in ("alices", "nobodys"):
        keyed["bob"].delete(f"/v1/sessions/{name}")
    assert keyed["alice"].post("/v1/sessions", json={"id": "alices"}).status_code == 201
    before = keyed["alice"].get("/v1/sessions/alices").json()
    theirs, nobodys = calls("alices"), calls("nobodys")
    for (method, path, body), (_, missing, nothing) in zip(theirs, nobodys, strict=True):
        seen = keyed["bob"].request(method, path, json=body)
        expected = keyed["bob"].request(method, missing, json=nothing)
        error_of(seen, 404)
        assert seen.text == expected.text.replace("nobodys", "alices")
        differing = {"date", "x-request-id", "content-length"}
        for answer in (seen, expected):
            for header in differing:
                answer.headers.pop(header, None)
        assert seen.headers == expected.headers
    assert keyed["alice"].get("/v1/sessions/alices").json() == before


@pytest.mark.parametrize("name", ["alice~mine", "~mine", "mine~", "a~b~c", "bob~alice~mine"])
def test_qualified_names_lead_nowhere_without_the_scope(
    keyed: Keyed, live: Live, name: str
) -> None:
    keyed["alice"].post("/v1/sessions", json={"id": "mine"})
    for method, path, body in calls(name):
        for client in (keyed["bob"], keyed["alice"], live.http):
            error_of(client.request(method, path, json=body), 404)
    for client in (keyed["bob"], keyed["root"], live.http):
        assert error_of(client.post("/v1/sessions", json={"id": name}), 400)["param"] == "id"
        client.post("/v1/sessions", json={"id": "here"})
        error = error_of(client.post("/v1/sessions/here/fork", json={"id": name}), 400)
        assert error["param"] == "id"


def test_two_keys_use_the_same_name_without_learning_of_each_other(keyed: Keyed) -> None:
    alice, bob = keyed["alice"], keyed["bob"]
    for client in (alice, bob):
        made = client.post("/v1/sessions", json={"id": "my-repo"})
        assert made.status_code == 201
        assert made.json()["id"] == "my-repo"
        error = error_of(client.post("/v1/sessions", json={"id": "my-repo"}), 409)
        assert error["message"].startswith("session 'my-repo' exists")
    teaching = {"documents": [{"text": PROMPT * 4}], "gate": "fixed", "chunk_size": 32}
    report = alice.post("/v1/sessions/my-repo/adapt", json=teaching).json()
    assert report["session"] == "my-repo"
    assert report["version_after"] > 0
    assert alice.get("/v1/sessions/my-repo").json()["version"] == report["version_after"]
    assert bob.get("/v1/sessions/my-repo").json()["version"] == 0
    asked = {"prompt": PROMPT, "max_tokens": 1, "ttt": {"session": "my-repo", "gate": "off"}}
    answers = [client.post("/v1/completions", json=asked).json() for client in (alice, bob)]
    assert [answer["ttt"]["session"] for answer in answers] == ["my-repo", "my-repo"]
    assert answers[0]["ttt"]["digest"] != answers[1]["ttt"]["digest"]
    fork = bob.post("/v1/sessions/my-repo/fork", json={"id": "alices-fork"}).json()
    assert (fork["id"], fork["owner"]) == ("alices-fork", "bob")
    archive = alice.get("/v1/sessions/my-repo/adapter")
    assert 'filename="my-repo.zip"' in archive.headers["content-disposition"]
    assert bob.delete("/v1/sessions/my-repo").json()["id"] == "my-repo"
    assert alice.get("/v1/sessions/my-repo").status_code == 200


def test_list_has_own_sessions_only_and_an_administrators_all(keyed: Keyed) -> None:
    own = {name: keyed[name].post("/v1/sessions").json()["id"] for name in ("alice", "bob", "root")}
    for name in ("alice", "bob"):
        listed = keyed[name].get("/v1/sessions").json()["data"]
        assert own[name] in [session["id"] for session in listed]
        assert {session["owner"] for session in listed} == {name}
        assert not any("~" in session["id"] for session in listed)
    everything = {s["id"]: s["owner"] for s in keyed["root"].get("/v1/sessions").json()["data"]}
    assert everything[own["root"]] == "root"
    for name in ("alice", "bob"):
        assert everything[f"{name}~{own[name]}"] == name


def test_administrator_reaches_every_session_by_its_full_name(keyed: Keyed) -> None:
    name = keyed["alice"].post("/v1/sessions").json()["id"]
    full = f"alice~{name}"
    for method, path, body in calls(full):
        if method != "DELETE":
            assert keyed["root"].request(method, path, json=body).status_code in (200, 201)
    shown = keyed["root"].get(f"/v1/sessions/{full}").json()
    assert (shown["id"], shown["owner"]) == (full, "alice")
    assert "copy" in [s["id"] for s in keyed["root"].get("/v1/sessions").json()["data"]]
    assert keyed["root"].delete(f"/v1/sessions/{full}").json()["id"] == full
    error_of(keyed["alice"].get(f"/v1/sessions/{name}"), 404)


def test_key_has_as_many_sessions_as_it_may(keyed: Keyed) -> None:
    few = keyed["few"]
    names = [few.post("/v1/sessions").json()["id"] for _ in range(2)]
    for answer in (few.post("/v1/sessions"), few.post(f"/v1/sessions/{names[0]}/fork")):
        error = error_of(answer, 429)
        assert "2 is the limit" in error["message"]
        assert int(answer.headers["Retry-After"]) >= 1
    assert few.delete(f"/v1/sessions/{names[0]}").status_code == 200
    assert few.post("/v1/sessions").status_code == 201


def test_more_prompts_than_may_wait_are_refused_for_good(keyed: Keyed) -> None:
    body = {"prompt": [PROMPT] * 4, "max_tokens": 1}
    error = error_of(keyed["few"].post("/v1/completions", json=body), 400)
    assert "at most 3" in error["message"]
    assert keyed["bob"].post("/v1/completions", json=body).status_code == 200
