"""A server without keys answers programs on its machine, and no page of another site."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.live import Live, live_server


@pytest.fixture(scope="module")
def open_server(tiny_llama_dir: Path) -> Iterator[Live]:
    """No keys, on loopback."""
    with live_server(tiny_llama_dir) as server:
        yield server


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example", "Content-Type": "text/plain"},
        {"Origin": "null"},
        {"Origin": "http://[broken"},
        {"Host": "evil.example"},
        {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "192.168.1.7:8000"},
    ],
)
def test_pages_of_other_sites_are_refused(open_server: Live, headers: dict[str, str]) -> None:
    for method, path in (("POST", "/v1/sessions"), ("GET", "/v1/sessions")):
        answer = httpx.request(method, open_server.url + path, headers=headers)
        assert answer.status_code == 403, answer.text
        error = answer.json()["error"]
        assert "is not this machine" in error["message"]
        assert "--api-key-file" in error["message"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "app.localhost"])
def test_programs_and_pages_of_this_machine_are_served(open_server: Live, host: str) -> None:
    headers = {"Host": host, "Origin": "http://localhost:3000"}
    assert httpx.get(open_server.url + "/v1/sessions", headers=headers).status_code == 200


def test_where_something_else_keeps_strangers_out_any_name_will_do(tiny_llama_dir: Path) -> None:
    with live_server(tiny_llama_dir, allow_unauthenticated=True) as server:
        headers = {"Host": "ponder.internal", "Origin": "http://editor.internal"}
        assert httpx.get(server.url + "/v1/models", headers=headers).status_code == 200
