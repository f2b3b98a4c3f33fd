"""PonderTTT's own endpoints over HTTP; completions need no more than the `openai` client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx

from ponderttt.errors import PonderError

_ATTEMPTS = 10
_LONGEST_WAIT = 60.0


class ServerError(PonderError):
    """The server refused a request or failed.

    Args:
        status: of HTTP; 0 where the answer broke off.
        message: the server's own.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """One server.

    Args:
        base_url: with or without `/v1`.
        timeout: seconds to connect, and to wait for short answers; learning may take longer.
    """

    def __init__(self, base_url: str, timeout: float = 30.0) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        limits = httpx.Timeout(timeout)
        self._http = httpx.Client(base_url=self.base_url, timeout=limits)
        self._patient = httpx.Timeout(timeout, read=None)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def session(self, name: str) -> dict[str, Any] | None:
        """A session, or None if there is none of this name."""
        try:
            return self._json("GET", f"/v1/sessions/{quote(name, safe='')}")
        except ServerError as error:
            if error.status == 404:
                return None
            raise

    def create_session(self, name: str) -> dict[str, Any]:
        """A new session."""
        return self._json("POST", "/v1/sessions", {"id": name})

    def adapt(
        self, session: str, documents: Sequence[Mapping[str, str]], options: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Teach a session; every chunk as it is learned, then the report.

        Args:
            session: its id.
            documents: each with `path` and `text`.
            options: gate, budget, …
        Raises:
            ServerError: the server refuses, or fails on the way.
            PonderError: there is no server.
        """
        body = {**options, "documents": list(documents), "stream": True}
        path = f"/v1/sessions/{quote(session, safe='')}/adapt"
        for attempt in range(_ATTEMPTS):
            with self._stream(path, body) as response:
                if response.status_code != 429 or attempt == _ATTEMPTS - 1:
                    yield from _objects(response)
                    return
                wait = _retry_after(response)
            time.sleep(wait)

    def _stream(self, path: str, body: Mapping[str, Any]) -> Any:
        return _Translated(
            self._http.stream("POST", path, json=body, timeout=self._patient), self.base_url
        )

    def _json(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        with _Translated(self._http.stream(method, path, json=body), self.base_url) as response:
            response.read()
            _check(response)
            answer: dict[str, Any] = response.json()
            return answer


class _Translated:
    """A response whose transport errors become ours."""

    def __init__(self, stream: Any, base_url: str) -> None:
        self._stream = stream
        self._base_url = base_url

    def __enter__(self) -> httpx.Response:
        try:
            response: httpx.Response = self._stream.__enter__()
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise PonderError(
                f"no answer from {self._base_url} ({error}); start a server with `ponderttt "
                "serve`, or name another with --base-url"
            ) from error
        return response

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        self._stream.__exit__(kind, error, trace)
        if isinstance(error, httpx.TransportError):
            raise ServerError(
                0, f"the connection to {self._base_url} broke off: {error}"
            ) from error


def _objects(response: httpx.Response) -> Iterator[dict[str, Any]]:
    if response.is_error:
        response.read()
        _check(response)
    for line in response.iter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        value: dict[str, Any] = json.loads(data)
        if "error" in value:
            raise ServerError(0, str(value["error"]["message"]))
        yield value
    raise ServerError(0, "the server broke off in the middle of its answer")


def _check(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    raise ServerError(response.status_code, f"{response.status_code}: {message}")


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(max(float(response.headers["Retry-After"]), 0.1), _LONGEST_WAIT)
    except (KeyError, ValueError):
        return 1.0
