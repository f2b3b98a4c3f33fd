"""API keys: a TOML file with their hashes, read again when it changes.

    [keys.alice]
    sha256 = "…"                    # of the key; `ponderttt keys new` makes both
    scopes = ["completions"]        # completions, metrics, admin
    max_sessions = 10               # optional; else the server's --max-sessions-per-key
    max_waiting = 20                # optional; else the server's --max-waiting-per-key

Keys are 256 random bits, which nobody can guess: a fast hash is enough. (The slow ones, made for
passwords, would cost every request a tenth of a second.) What belongs to a key hangs on its id, so
a key is replaced by writing another hash below the same id.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ponderttt.errors import InvalidRequestError
from ponderttt.sessions.names import KEY_SEPARATOR, check_key_id, qualified_name

_LOG = logging.getLogger(__name__)

Scope = Literal["completions", "metrics", "admin"]

#: Seconds between two looks at the file.
RELOAD_SECONDS = 1.0

_PREFIX = "ponder-"
_MAX_FILE_BYTES = 1 << 20
# Nothing longer is worth hashing.
_MAX_KEY_BYTES = 512


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key as the server knows it.

    Args:
        id: what belongs to the key hangs on it; the log names it.
        digest: SHA-256 of the key.
        scopes: `completions`: all of the API, own sessions only; `metrics`: /metrics; `admin`:
            everything, and everybody's sessions.
        max_sessions, max_waiting: limits of this key; None: the server's.
    """

    id: str
    digest: bytes
    scopes: frozenset[Scope]
    max_sessions: int | None = None
    max_waiting: int | None = None

    def may(self, scope: Scope) -> bool:
        """Whether the key opens what needs this scope."""
        return scope in self.scopes or "admin" in self.scopes


def session_name(key: ApiKey | None, name: str) -> str | None:
    """The engine's name for the session that a key's owner calls `name`.

    Args:
        key: None where the server has no keys.
        name: as in a request.
    Returns:
        None where no session that they may see can have this name.
    """
    if KEY_SEPARATOR not in name:
        return qualified_name(key.id if key is not None else None, name)
    if key is not None and key.may("admin"):
        return name.removeprefix(KEY_SEPARATOR)
    return None


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[list[Scope], Field(min_length=1)]
    max_sessions: Annotated[int | None, Field(ge=0, strict=True)] = None
    max_waiting: Annotated[int | None, Field(ge=1, strict=True)] = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: Annotated[dict[str, _Entry], Field(min_length=1)]


def new_key() -> str:
    """A fresh key of 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def digest_of(key: bytes) -> bytes:
    """What the file keeps of a key."""
    return hashlib.sha256(key).digest()


def load_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file.

    Raises:
        InvalidRequestError: it can't be read, or an entry is wrong; says which. Never shows hashes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            raise _problem(path, f"has more than {_MAX_FILE_BYTES} bytes")
        entries = _File.model_validate(tomllib.loads(data.decode("utf-8"))).keys
    except OSError as error:
        raise _problem(path, f"can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _problem(path, f"is not valid TOML: {error}") from error
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise _problem(path, f"{place}: {problem['msg']}") from error
    return _checked(path, entries)


def _checked(path: Path, entries: dict[str, _Entry]) -> tuple[ApiKey, ...]:
    keys: dict[str, ApiKey] = {}
    for key_id, entry in entries.items():
        check_key_id("api_key_file", key_id)
        if entry.sha256 in keys:
            raise _problem(path, f"{keys[entry.sha256].id} and {key_id} have the same sha256")
        keys[entry.sha256] = ApiKey(
            key_id,
            bytes.fromhex(entry.sha256),
            frozenset(entry.scopes),
            entry.max_sessions,
            entry.max_waiting,
        )
    return tuple(keys.values())


def _problem(path: Path, what: str) -> InvalidRequestError:
    return InvalidRequestError(
        "api_key_file", f"{path} {what}; `ponderttt keys new --id NAME` prints what belongs in it"
    )


class KeyRing:
    """The keys of a file that may change while the server runs.

    A file that has become unreadable or wrong changes nothing: the keys stay as they were, and the
    log says why.

    Args:
        path: of the file.
        clock: seconds, monotonic.
    Raises:
        InvalidRequestError: the file is wrong to begin with.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._stamp = _stamp(path)
        self._keys = load_keys(path)
        self._next_look = clock() + RELOAD_SECONDS

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, key: bytes) -> ApiKey | None:
        """Whose key it is, if anybody's. How long it takes does not depend on the key."""
        self._reload_if_changed()
        if len(key) > _MAX_KEY_BYTES:
            return None
        digest, found = digest_of(key), None
        for each in self._keys:
            if hmac.compare_digest(each.digest, digest):
                found = each
        return found

    def _reload_if_changed(self) -> None:
        if self._clock() < self._next_look:
            return
        self._next_look = self._clock() + RELOAD_SECONDS
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = load_keys(self._path)
        except InvalidRequestError as error:
            _LOG.error("%s. The %d keys stay as they were", error, len(self._keys))
        else:
            _LOG.info("api_key_file %s has changed: %d keys", self._path, len(self._keys))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


_BEARER = re.compile(rb"bearer +(\S+) *", re.IGNORECASE)


def bearer_token(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """The key that a request brings; None where it brings none, several, or something else."""
    given = [value for name, value in headers if name == b"authorization"]
    match = _BEARER.fullmatch(given[0]) if len(given) == 1 else None
    return match[1] if match is not None else None
