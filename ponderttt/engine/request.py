"""What callers hand to the engine."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.sampling_params import SamplingParams


def new_request_id() -> str:
    """A random id."""
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks, as far as sharing the engine fairly is concerned.

    Args:
        id: requests of one id wait in one line; None: of everybody who is not known by name.
        max_waiting: requests of theirs that may wait; None: as many as the queue takes.
    """

    id: str | None = None
    max_waiting: int | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt to continue (n times).

    Args:
        prompt_ids: at least one token id.
        sampling: how to draw.
        ttt: test-time training; None: the server's default gate, weights for this request only.
        request_id: unique.
        arrival: seconds of the monotonic clock.
        tenant: who asks.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    ttt: TTTParams | None = None
    request_id: str = field(default_factory=new_request_id)
    arrival: float = field(default_factory=time.monotonic)
    tenant: Tenant = field(default_factory=Tenant)


@dataclass(frozen=True, slots=True)
class AdaptRequest:
    """Documents to teach a session, in order; text beyond the context window is cut into windows.

    Args:
        documents: token ids of each, none empty.
        ttt: names the session.
        request_id: unique.
        arrival: seconds of the monotonic clock.
        tenant: who asks.
    """

    documents: tuple[tuple[int, ...], ...]
    ttt: TTTParams
    request_id: str = field(default_factory=new_request_id)
    arrival: float = field(default_factory=time.monotonic)
    tenant: Tenant = field(default_factory=Tenant)


Request = GenerateRequest | AdaptRequest
