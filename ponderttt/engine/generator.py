"""What the engine asks of somebody else who generates in its place.

The engine keeps everything but the drawing of tokens: it admits, learns, stores and talks to the
caller. A `Generator` continues texts; the tokens come back through `arrivals`, in the engine's
thread, and take the same way to the caller as the engine's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ponderttt.engine.sampler import SampledToken
from ponderttt.engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Adapter:
    """Fast weights at one version, fixed, in whatever process they are needed.

    Args:
        owner: of the weights.
        version: of them.
        digest: their SHA-256, in hexadecimal; the same owner and version may come again with other
            weights, after a session was deleted and made anew.
        write: makes a PEFT adapter directory of them; may be called in any thread.
    """

    owner: str
    version: int
    digest: str
    write: Callable[[Path], None] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Continuation:
    """One text to be continued.

    Args:
        id: unique.
        tokens: the text so far.
        max_tokens: new tokens at most, 1 or more.
        sampling: how to draw; its `n`, `max_tokens` and `seed` do not count here.
        seed: makes the draw reproducible; None: any.
        stop_ids: tokens that end the text; they are reported like others.
        adapter: whose weights to read with; None: the base model.
    """

    id: str
    tokens: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    seed: int | None
    stop_ids: tuple[int, ...]
    adapter: Adapter | None


@dataclass(frozen=True, slots=True)
class Drawn:
    """Further tokens of a continuation; log-probabilities are NaN where none were asked for."""

    id: str
    tokens: tuple[SampledToken, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """A continuation is complete: it has its tokens, or was `stopped` before."""

    id: str
    stopped: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """A continuation will not be completed."""

    id: str
    error: Exception


Arrival = Drawn | Ended | Failed


@dataclass(slots=True)
class AdapterCounts:
    """What became of adapters and requests elsewhere.

    Args:
        loaded, slots: adapters that are loaded now, and that may be at once.
        hits: continuations that found their adapter loaded.
        loads, unloads: adapters published and loaded; adapters unloaded.
        evictions: unloads that made room for others.
        retries: continuations that had to begin again.
        errors: by what went wrong.
    """

    loaded: int = 0
    slots: int = 0
    hits: int = 0
    loads: int = 0
    unloads: int = 0
    evictions: int = 0
    retries: int = 0
    errors: dict[str, int] = field(default_factory=dict)


class Generator(Protocol):
    """Continues texts. All methods return at once, and are called in the engine's thread."""

    #: Called from any thread when `arrivals` has something.
    on_arrival: Callable[[], None]
    #: Called from any thread with the seconds that publishing an adapter took.
    on_published: Callable[[float], None]

    def start(self, continuation: Continuation) -> None:
        """Begin to continue a text."""

    def cancel(self, continuation_id: str) -> None:
        """Stop; nothing more need arrive."""

    def arrivals(self) -> Sequence[Arrival]:
        """What has come since the last call, in order for each continuation."""

    def publish(self, adapter: Adapter) -> None:
        """Have an adapter loaded before anybody asks for it; failures are only logged."""

    def forget(self, owner: str) -> None:
        """The owner's adapters are not needed any more."""

    def counts(self) -> AdapterCounts:
        """A copy of the counts; from any thread."""

    def close(self) -> None:
        """Stop everything and take back what was published."""
