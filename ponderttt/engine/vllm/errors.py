"""What can go wrong between us and vLLM.

UnavailableError
└── VllmError                     what callers see, as 503
    ├── VllmUnreachableError      no connection, it broke, 5xx: may pass; tried again
    ├── VllmTimeoutError          nothing came for too long
    ├── AdapterGoneError          vLLM doesn't know the adapter (any more): loaded again
    ├── PublishError             an adapter's files can't be written
    └── VllmRefusedError          an answer that will not change: 4xx
"""

from __future__ import annotations

from ponderttt.errors import UnavailableError


class VllmError(UnavailableError):
    """vLLM doesn't do its part."""

    #: For the metrics.
    kind = "other"


class VllmUnreachableError(VllmError):
    """No connection, a broken one, or an error of the server's: it may pass."""

    kind = "unreachable"


class VllmTimeoutError(VllmError):
    """Nothing came for too long."""

    kind = "timeout"


class AdapterGoneError(VllmError):
    """vLLM doesn't know an adapter; it has been restarted, most likely."""

    kind = "adapter_gone"


class PublishError(VllmError):
    """An adapter's files can't be written: a full disk, most likely."""

    kind = "publish"


class VllmRefusedError(VllmError):
    """vLLM doesn't take a request or an adapter as it is; `status` is its answer's."""

    kind = "refused"

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
