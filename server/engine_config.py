"""From the server's settings to the engine's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.rules import UpdateRule, rule_for
from ponderttt.engine.config import EngineConfig, TTTDefaults
from ponderttt.fast_weights.layout import LoRAConfig
from server.settings import Settings


def engine_config(settings: Settings) -> EngineConfig:
    """Limits and defaults of the engine.

    Raises:
        InvalidRequestError: values that don't fit together.
    """
    return EngineConfig(
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_waiting=settings.max_waiting,
        max_kv_tokens=settings.max_kv_tokens,
        max_batch_tokens=settings.max_batch_tokens,
        busy_batch_tokens=settings.busy_batch_tokens,
        decode_share=settings.decode_share,
        adapter_slots=settings.adapter_slots,
        max_sessions=settings.max_sessions,
        lora=LoRAConfig(
            rank=settings.rank,
            alpha=settings.alpha,
            layers=settings.adaptive_layers,
            targets=_targets(settings.targets),
        ),
        rule=_rule(settings),
        ttt=TTTDefaults(
            gate=settings.gate,
            action=Action[settings.action],
            budget=settings.budget,
            cost_model=settings.cost_model,
            chunk_size=settings.chunk_size,
            adapt_on=settings.adapt_on,
            when=settings.when,
        ),
        measure_costs=settings.measure_costs,
    )


def _targets(text: str) -> str | tuple[str, ...]:
    if text in ("mlp", "all"):
        return text
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _rule(settings: Settings) -> UpdateRule | None:
    if settings.learning_rate is None:
        return None
    # The name by which the engine looks up the calibrated rule.
    rule = rule_for(Path(settings.model).name)
    return replace(rule, learning_rate=settings.learning_rate)
