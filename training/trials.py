"""Trials: configurations of a gradient step, and the stages in which they are varied."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.calibration import Calibration
from ponderttt.adaptation.rules import UpdateRule
from ponderttt.fast_weights.layout import LoRAConfig


@dataclass(frozen=True, slots=True)
class Trial:
    """One configuration.

    Args:
        lora, rule: shape and step.
        action: taken on every chunk that the budget pays for.
        chunk_size: tokens per chunk.
    """

    lora: LoRAConfig
    rule: UpdateRule
    action: Action = Action.UPDATE_1
    chunk_size: int = 256

    def key(self) -> str:
        """The same for equal trials, whatever run they are of."""
        return json.dumps(self.to_dict(), sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back."""
        parts = Calibration(self.lora, self.rule).to_dict()
        return {**parts, "action": self.action.name, "chunk_size": self.chunk_size}


Stage = tuple[str, Callable[[Trial], Iterable[tuple[str, Trial]]]]


def rule_stage(name: str, *changes: Mapping[str, Any]) -> Stage:
    """Vary fields of the update rule."""

    def around(best: Trial) -> Iterable[tuple[str, Trial]]:
        for change in changes:
            yield _words(change), replace(best, rule=replace(best.rule, **change))

    return name, around


def rate_stage(*factors: float) -> Stage:
    """Vary the learning rate."""

    def around(best: Trial) -> Iterable[tuple[str, Trial]]:
        for factor in factors:
            rate = best.rule.learning_rate * factor
            yield (
                f"learning_rate={rate:.3g}",
                replace(best, rule=replace(best.rule, learning_rate=rate)),
            )

    return "learning rate", around


def rank_stage(*ranks: int) -> Stage:
    """Vary the rank; the delta's scale stays, the learning rate falls with the root of the rank."""

    def around(best: Trial) -> Iterable[tuple[str, Trial]]:
        for rank in ranks:
            factor = (best.lora.rank / rank) ** 0.5
            rate = best.rule.learning_rate * factor
            lora = replace(best.lora, rank=rank, alpha=best.lora.scale * rank)
            yield (
                f"rank={rank}",
                replace(best, lora=lora, rule=replace(best.rule, learning_rate=rate)),
            )

    return "rank", around


def shape_stage(name: str, *changes: Mapping[str, Any]) -> Stage:
    """Vary fields of the shape."""

    def around(best: Trial) -> Iterable[tuple[str, Trial]]:
        for change in changes:
            yield _words(change), replace(best, lora=replace(best.lora, **change))

    return name, around


def chunk_stage(*sizes: int) -> Stage:
    """Vary the chunk size."""

    def around(best: Trial) -> Iterable[tuple[str, Trial]]:
        for size in sizes:
            yield f"chunk_size={size}", replace(best, chunk_size=size)

    return "chunk size", around


def default_stages(layers: int) -> tuple[Stage, ...]:
    """What is searched, the most important first.

    Args:
        layers: of the model.
    """
    return (
        rate_stage(0.5, 2.0),
        rank_stage(4, 8, 16, 32),
        rate_stage(0.7, 1.4),
        rule_stage(
            "optimizer",
            {"beta1": 0.9},
            {"beta1": 0.6},
            {"optimizer": "sgd", "learning_rate": 0.3},
            {"optimizer": "sgd", "learning_rate": 1.0},
            {"optimizer": "muon", "learning_rate": 0.0005},
            {"optimizer": "muon", "learning_rate": 0.001},
            {"freeze_a": True},
        ),
        shape_stage("projections", {"targets": "all"}, {"targets": ("down_proj",)}),
        shape_stage("blocks", {"layers": max(layers // 8, 1)}, {"layers": max(layers // 2, 1)}),
        rule_stage("decay", {"decay": 0.01}),
        rule_stage("trust region", {"trust_region": 3.0}),
        rule_stage("tokens", {"token_share": 0.5}),
        chunk_stage(128, 512),
    )


def step_stages() -> tuple[Stage, ...]:
    """How the rate falls over the steps of UPDATE_2 and UPDATE_4."""
    return (
        rule_stage(
            "steps",
            *(
                {"step_scales": scales}
                for scales in (
                    (1.0, 1.0, 1.0, 1.0),
                    (1.0, 0.5, 0.3, 0.3),
                    (1.0, 0.5, 0.25, 0.125),
                    (1.0, 0.25, 0.1, 0.1),
                )
            ),
        ),
    )


def _words(change: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in change.items())
