"""What both clients share: errors, when to ask again, and how to read what comes back.

    PonderError
    └── ServerError              the server refused a request or failed; has the HTTP status
        ├── UnreachableError     nothing answers at this address
        ├── SlowError            nothing came in time
        ├── BrokenAnswerError    the answer ended too early
        └── AnswerError          the answer is none of an OpenAI-compatible endpoint

Nothing here does input or output, so that the synchronous and the asynchronous client are two
thin shells around it, `clients.calls`, `clients.answers` and `clients.events`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from clients.calls import FIRST_WAIT, RETRIES
from ponderttt.errors import InvalidRequestError, PonderError

#: The server takes no request now, but may later; it has done nothing.
RETRYABLE = (429, 503)
#: Seconds; no server is given more time until it is asked again, whatever it asks for.
LONGEST_WAIT = 60.0
_SNIPPET = 200


class ServerError(PonderError):
    """The server refused a request or failed.

    Args:
        status: of HTTP; 0 where there is none, or where the answer broke off.
        message: the server's own, where it has one.
        retry_after: seconds that the server asks to wait, if it does.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class UnreachableError(ServerError):
    """Nothing answers at this address."""


class SlowError(ServerError):
    """Nothing came in time."""


class BrokenAnswerError(ServerError):
    """The answer ended too early."""


class AnswerError(ServerError):
    """The answer is no JSON, or lacks a field."""


# Others are passing: Request Timeout, Too Early and Too Many Requests.
_PASSING = (408, 425, 429)


def lacks_route(error: ServerError) -> bool:
    """Whether the endpoint has no such route: it says so, keeps it from us, or has a page there.

    Not where it is unreachable, busy or failing: then the same request may be answered later.
    """
    return (200 <= error.status < 500 and error.status not in _PASSING) or error.status == 501


@dataclass(frozen=True, slots=True)
class Backoff:
    """When to ask again after 429 and 503.

    Waits double from `first`, and half of each is random, lest many clients come back at once. What
    the server asks for with `Retry-After` is waited at least; it is an estimate, and may be wrong
    again and again.

    Args:
        retries: times that a request is sent again; 0 for never.
        first: seconds.
        longest: seconds, also of what the server may ask for.
        draw: a number in [0, 1).
        busy: called before each wait with what a user should know.
    """

    retries: int = RETRIES
    first: float = FIRST_WAIT
    longest: float = LONGEST_WAIT
    draw: random.Random = field(default_factory=random.Random)
    busy: Callable[[str], None] | None = None

    def again(self, response: httpx.Response, attempt: int) -> float | None:
        """Seconds to wait, or None if this answer counts.

        Args:
            response: what came.
            attempt: how many times the request has been sent again.
        """
        if response.status_code not in RETRYABLE or attempt >= self.retries:
            return None
        # The exponent is bounded, lest it overflow.
        wait: float = min(self.first * 2.0 ** min(attempt, 30), self.longest)
        wait *= 0.5 + 0.5 * self.draw.random()
        wait = min(max(retry_after(response) or 0.0, wait), self.longest)
        if self.busy is not None:
            self.busy(
                f"the server is busy ({response.status_code}), asking again in {wait:.2g} s, "
                f"{attempt + 1} of {self.retries}"
            )
        return wait


def retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait, which it may also give as a date; None if it doesn't.

    Source: RFC 9110, section 10.2.3.
    """
    text = response.headers.get("Retry-After", "").strip()
    try:
        return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else _seconds_until(text)
    except (TypeError, ValueError):
        return None


def _seconds_until(date: str) -> float:
    at = parsedate_to_datetime(date)
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return (at - datetime.now(UTC)).total_seconds()


def public_url(base_url: str) -> str:
    """A server's address as it may be shown and stored: without `/v1`, user and password.

    Raises:
        UnreachableError: it is no address.
    """
    try:
        url = httpx.URL(base_url.rstrip("/").removesuffix("/v1"))
    except httpx.InvalidURL as error:
        raise unreachable(re.sub(r"//.*@", "//", base_url), error) from error
    return str(url.copy_with(username=None, password=None)) if url.userinfo else str(url)


@contextmanager
def translated(base_url: str, seconds: float | None) -> Iterator[None]:
    """httpx' errors become ours.

    Args:
        base_url: of the server.
        seconds: the time limit, for the message.
    """
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
        raise unreachable(base_url, error) from error
    except httpx.InvalidURL as error:
        raise unreachable(base_url, error) from error
    except (httpx.TimeoutException, TimeoutError) as error:
        raise slow(base_url, seconds) from error
    except (httpx.RequestError, httpx.StreamError) as error:
        raise BrokenAnswerError(
            0, f"the connection to {base_url} broke off: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """Its words; where it has none, as that of a connection that was cut, its name."""
    return str(error) or type(error).__name__


def unreachable(base_url: str, error: Exception) -> UnreachableError:
    """Nothing answers there."""
    return UnreachableError(
        0,
        f"no answer from {base_url} ({_reason(error)}); start a server with `ponderttt serve`, or "
        "name another with --base-url",
    )


def slow(base_url: str, seconds: float | None) -> SlowError:
    """Nothing came in time."""
    within = f" within {seconds:g} s" if seconds is not None else ""
    return SlowError(
        0, f"no answer from {base_url}{within}; it may be busy: wait, or allow more time"
    )


def read_answer(response: httpx.Response, content: bytes) -> httpx.Response:
    """The same answer as one that has been read.

    Args:
        response: that is being streamed.
        content: its body, decompressed.
    """
    kept = ("content-type", "location", "retry-after")
    headers = {name: value for name, value in response.headers.items() if name.lower() in kept}
    return httpx.Response(
        response.status_code, headers=headers, content=content, request=response.request
    )


def headers(api_key: str | None) -> dict[str, str]:
    """What every request carries.

    Raises:
        InvalidRequestError: the key has characters that no header can hold; it isn't shown.
    """
    if api_key is None:
        return {}
    if not re.fullmatch(r"[!-~]+", api_key):
        raise InvalidRequestError(
            "api_key", "holds spaces or other characters that keys don't have; check the key file"
        )
    return {"Authorization": f"Bearer {api_key}"}


def check(response: httpx.Response, attempts: int = 1) -> None:
    """Raise what the server says is wrong; its body must have been read.

    Args:
        response: of any status.
        attempts: how often the request was sent.
    Raises:
        ServerError: the status is none of success.
    """
    if response.is_success:
        return
    tried = f" (tried {attempts} times)" if attempts > 1 else ""
    status = response.status_code
    message = f"{status}: {_message(response)}{tried}"
    raise ServerError(status, message, retry_after(response))


def _message(response: httpx.Response) -> str:
    """The server's own words, in the forms that servers have for them."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if isinstance(body, Mapping):
        said = body.get("error", body.get("message", body.get("detail")))
        if isinstance(said, Mapping):
            said = said.get("message")
        if said is not None:
            return str(said)
    words = snippet(response.text)
    location = response.headers.get("Location")
    if location is not None:
        return f"it sends us on to {location}; give that address {words}".rstrip()
    return words or response.reason_phrase or "no reason given"


def snippet(text: str) -> str:
    """The beginning of a page or another text, without tags."""
    words = " ".join(re.sub(r"<[^>]*>", " ", text[: 20 * _SNIPPET]).split())
    return words if len(words) <= _SNIPPET else words[: _SNIPPET - 1] + "…"


def json_object(response: httpx.Response) -> dict[str, Any]:
    """The JSON object that was answered; its body must have been read.

    Raises:
        AnswerError: it is something else.
        ServerError: it says that the server has failed, though its status is one of success.
    """
    try:
        value = response.json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise foreign(response, snippet(response.text))
    said = error_in(value)
    if said is not None:
        status = response.status_code
        raise ServerError(status, f"{response.request.url} answered {status}, but: {said}")
    return value


def error_in(value: Mapping[str, Any]) -> str | None:
    """The server's own words where an object speaks of an error; None where it doesn't."""
    error = value.get("error")
    if not error:
        return None
    return str(error.get("message", error) if isinstance(error, Mapping) else error)


def foreign(response: httpx.Response, what: str) -> AnswerError:
    """The answer is none of such an endpoint."""
    kind = media_type(response) or "no media type"
    return AnswerError(
        response.status_code,
        f"{response.request.url} answered {response.status_code} with {kind} ({what}); is "
        "--base-url that of an OpenAI-compatible endpoint?",
    )


def media_type(response: httpx.Response) -> str:
    """What the answer says it is, in small letters; may be empty."""
    kind: str = response.headers.get("Content-Type", "")
    return kind.partition(";")[0].strip().lower()
