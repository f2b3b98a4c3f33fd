"""Names of sessions: what clients call them, and how those of different API keys are kept apart."""

from __future__ import annotations

import re
import uuid

from ponderttt.errors import InvalidRequestError

#: Between the id of the API key that a session belongs to and the name that its owner gave it.
KEY_SEPARATOR = "~"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_KEY_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


def new_session_id() -> str:
    """A random name."""
    return f"session-{uuid.uuid4().hex[:12]}"


def qualified_name(key_id: str | None, name: str) -> str:
    """A session's name in the engine: those of two API keys never meet."""
    return name if key_id is None else f"{key_id}{KEY_SEPARATOR}{name}"


def plain_name(qualified: str) -> str:
    """The name that the session's owner gave it."""
    return qualified.partition(KEY_SEPARATOR)[2] if KEY_SEPARATOR in qualified else qualified


def key_id_of(qualified: str) -> str | None:
    """Id of the API key that a session belongs to; None: of nobody in particular."""
    return qualified.partition(KEY_SEPARATOR)[0] if KEY_SEPARATOR in qualified else None


def check_session_id(param: str, name: str) -> None:
    """Raise InvalidRequestError unless a name is valid; it may be qualified by a key's id."""
    key_id = key_id_of(name)
    if key_id is not None:
        check_key_id(param, key_id)
    check_plain_name(param, plain_name(name))


def given_or_new_name(name: str | None) -> str:
    """A session's name; None makes one. InvalidRequestError where it is not valid."""
    name = new_session_id() if name is None else name
    check_session_id("id", name)
    return name


def is_session_id(name: str) -> bool:
    """Whether `check_session_id` has nothing against it."""
    try:
        check_session_id("id", name)
    except InvalidRequestError:
        return False
    return True


def check_plain_name(param: str, name: str) -> None:
    """Raise InvalidRequestError unless `name` is 1–128 of letters, digits, `.`, `_`, `-`."""
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(
            param,
            f"{name[:140]!r} is not a session id; use 1 to 128 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit",
        )


def check_key_id(param: str, key_id: str) -> None:
    """Raise InvalidRequestError unless `key_id` is 1 to 32 of a–z, 0–9, `_` and `-`."""
    if not _KEY_ID.fullmatch(key_id):
        raise InvalidRequestError(
            param,
            f"{key_id[:64]!r} is not a key's id; use 1 to 32 of a-z, 0-9, '_' and '-', beginning "
            "with a letter or digit",
        )
