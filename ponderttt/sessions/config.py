"""Where and how sessions are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ponderttt.errors import InvalidRequestError
from ponderttt.sessions.locks import LEASE_SECONDS


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Settings of a session store.

    Args:
        url: a directory, or a URL of fsspec.
        keep_versions: versions kept of each session, snapshots not counted; a damaged one is
            replaced by the one before, so that 1 leaves nothing to fall back to.
        write_delay: seconds after which a change is handed to the store at the latest.
        ram_sessions: sessions outside the bank whose weights stay in RAM.
        idle_seconds: after which an unused session is left to the store alone, and to any server.
        ttl: seconds after which an unused session is deleted; None: never.
        lease_seconds: after which the lock of a server that died is free, on stores other than
            local disk (there it is free at once).
        hand_over_seconds: how often to look whether another server asks for a session that is idle
            here; None: sessions stay until they have been idle for long.
    """

    url: str
    keep_versions: int = 3
    write_delay: float = 2.0
    ram_sessions: int = 64
    idle_seconds: float = 600.0
    ttl: float | None = None
    lease_seconds: float = LEASE_SECONDS
    hand_over_seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.url:
            raise InvalidRequestError("sessions", "is empty; give a directory or a URL")
        for name, least in (("keep_versions", 1), ("ram_sessions", 0)):
            if getattr(self, name) < least:
                raise InvalidRequestError(name, f"{getattr(self, name)} is below {least}")
        for name in ("write_delay", "idle_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidRequestError(name, f"{value} must be finite and at least 0 seconds")
        for name in ("lease_seconds", "hand_over_seconds"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InvalidRequestError(name, f"{value} must be finite and above 0 seconds")
        if self.ttl is not None and not (math.isfinite(self.ttl) and self.ttl > 0):
            raise InvalidRequestError("ttl", f"{self.ttl} must be finite and above 0 seconds")
