"""Counts of the engine at one moment, for metrics and load control."""

from __future__ import annotations

from dataclasses import dataclass, field

from ponderttt.engine.generator import AdapterCounts
from ponderttt.engine.prefix_cache import PrefixCounts
from ponderttt.sessions.stats import StoreStats


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts at one moment.

    `kv_*` in positions, `prefix_*` of the prefix cache, `store` of the session store, if there is
    one, `adapters` those that are loaded where somebody else generates.
    """

    running: int = 0
    waiting: int = 0
    background: int = 0
    kv_tokens: int = 0
    kv_capacity: int = 0
    bank_occupied: int = 0
    bank_capacity: int = 0
    sessions: int = 0
    evictions: int = 0
    prefix_trunk: PrefixCounts = field(default_factory=PrefixCounts)
    prefix_adaptive: PrefixCounts = field(default_factory=PrefixCounts)
    store: StoreStats | None = None
    adapters: AdapterCounts = field(default_factory=AdapterCounts)
