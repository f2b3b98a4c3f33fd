"""From the server's settings to the engine's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.calibration import Calibration, calibration_for, load_calibration
from ponderttt.config import data_dir
from ponderttt.engine.config import EngineConfig, TTTDefaults, served_name
from ponderttt.sessions.config import StoreConfig
from server.settings import Settings


def engine_config(settings: Settings) -> EngineConfig:
    """Limits and defaults of the engine.

    Raises:
        InvalidRequestError: values that don't fit together, or a calibration that can't be used.
    """
    calibration = _calibration(settings)
    return EngineConfig(
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_waiting=settings.max_waiting,
        max_wait_seconds=settings.max_wait_seconds,
        max_kv_tokens=settings.max_kv_tokens,
        prefix_cache_bytes=settings.prefix_cache_bytes,
        packed_weights=settings.packed_weights,
        native_kernels=settings.native_kernels,
        compile=settings.compile,
        max_batch_tokens=settings.max_batch_tokens,
        busy_batch_tokens=settings.busy_batch_tokens,
        decode_share=settings.decode_share,
        adapter_slots=settings.adapter_slots,
        max_sessions=settings.max_sessions,
        store=_store(settings),
        lora=calibration.lora,
        rule=calibration.rule,
        ttt=TTTDefaults(
            gate=settings.gate,
            action=Action[settings.action],
            budget=settings.budget,
            cost_model=settings.cost_model,
            chunk_size=settings.chunk_size,
            adapt_on=settings.adapt_on,
            when=settings.when,
            read=settings.read,
        ),
        measure_costs=settings.measure_costs,
    )


def _store(settings: Settings) -> StoreConfig | None:
    """None: sessions stay in memory."""
    if settings.sessions == "memory":
        return None
    # Another model's sessions are of no use: each has a directory of its own.
    model = served_name(settings.model).replace("/", "--")
    return StoreConfig(
        url=settings.sessions or str(data_dir() / "sessions" / model),
        keep_versions=settings.session_versions,
        write_delay=settings.session_write_delay,
        ram_sessions=settings.ram_sessions,
        idle_seconds=settings.session_idle_seconds,
        ttl=settings.session_ttl,
        lease_seconds=settings.session_lease_seconds,
        hand_over_seconds=settings.hand_over_seconds,
    )


def _calibration(settings: Settings) -> Calibration:
    """The file's, else the model's; what the settings name themselves wins."""
    if settings.calibration is not None:
        found = load_calibration(settings.calibration)
    else:
        found = calibration_for(served_name(settings.model))
    targets = None if settings.targets is None else _targets(settings.targets)
    shape = _given(
        rank=settings.rank, alpha=settings.alpha, layers=settings.adaptive_layers, targets=targets
    )
    step = _given(learning_rate=settings.learning_rate)
    return replace(found, lora=replace(found.lora, **shape), rule=replace(found.rule, **step))


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _targets(text: str) -> str | tuple[str, ...]:
    if text in ("mlp", "all"):
        return text
    return tuple(name.strip() for name in text.split(",") if name.strip())
