"""Every error that ponderttt raises on purpose.

    PonderError
    ├── InvalidRequestError      a value the caller can change; names field, value and limit
    │   └── PromptTooLongError   more tokens than the context window holds
    ├── NotFoundError            unknown model or session
    ├── ConflictError            session exists, is busy, or was changed meanwhile
    │   └── SessionElsewhereError    another server has the session's lock
    ├── OverloadedError          the waiting queue is full; try again later
    ├── UnavailableError         not ready, draining, or the engine stopped
    ├── ModelError               a checkpoint that cannot be fetched, verified, read or served
    ├── AdapterFormatError       fast weights that do not fit this model or are damaged
    ├── StoreError               the session store can't be reached, read or written
    ├── DamagedSessionError      a stored session of which no version can be read
    └── PolicyFormatError        a policy for something else, or damaged

`server/errors.py` turns them into HTTP statuses in one table.
"""

from __future__ import annotations


class PonderError(Exception):
    """Base of all errors raised on purpose; the message says what to do."""


class InvalidRequestError(PonderError, ValueError):
    """A value the caller can change.

    Args:
        param: the field, as the caller spelt it (dots for nesting, e.g. `ttt.budget`).
        message: names the value, the limit and what to do.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


class PromptTooLongError(InvalidRequestError):
    """The prompt and the tokens asked for do not fit the context window."""


class NotFoundError(PonderError, LookupError):
    """Unknown model or session."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class ConflictError(PonderError):
    """The session exists already, is busy, or was changed by somebody else meanwhile."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class SessionElsewhereError(ConflictError):
    """Another server of the same store has the session's lock."""


class OverloadedError(PonderError):
    """The waiting queue is full.

    Args:
        message: names the limit.
        retry_after: seconds after which a retry makes sense.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(PonderError):
    """Not ready yet, draining, or the engine has stopped."""


class ModelError(PonderError):
    """A checkpoint that cannot be fetched, verified, read or served."""


class AdapterFormatError(PonderError, ValueError):
    """Fast weights that do not fit this model, or are damaged."""


class StoreError(PonderError):
    """The session store can't be reached, read or written."""


class DamagedSessionError(PonderError):
    """A stored session of which no version can be read, or that was made for another model."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.param = "session"


class PolicyFormatError(PonderError, ValueError):
    """A policy for another model, feature version or format, or a damaged file."""
