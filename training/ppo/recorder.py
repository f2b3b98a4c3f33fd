"""What is kept of every iteration: a JSON line, TensorBoard scalars, and the progress bar."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from training.ppo.learner import UpdateStats
from training.ppo.network import NUM_ACTIONS
from training.ppo.rollout import RolloutBatch

STATISTICS_FILE = "statistics.jsonl"
TENSORBOARD_DIR = "tensorboard"


@dataclass(frozen=True, slots=True)
class BudgetStats:
    """One budget in one rollout.

    Args:
        budget: highest mean cost per step.
        steps: taken under it.
        reward, cost: means per step; None without a step.
        multiplier: λ in the update that followed.
    """

    budget: float
    steps: int
    reward: float | None
    cost: float | None
    multiplier: float


@dataclass(frozen=True, slots=True)
class IterationStats:
    """One iteration. Holds nothing that differs between two runs of the same seed.

    Args:
        iteration: counted from 0.
        steps: environment steps so far, this rollout's included.
        reward, cost: means per step of the rollout.
        budgets: the same, per budget.
        actions: share of each action.
        episodes: that ended.
        update: how the update went.
    """

    iteration: int
    steps: int
    reward: float
    cost: float
    budgets: tuple[BudgetStats, ...]
    actions: tuple[float, ...]
    episodes: int
    update: UpdateStats


def mean_by_budget(values: Tensor, budget_index: Tensor, num_budgets: int) -> Tensor:
    """[K] float64: mean of the values ([T, N]) under each budget; NaN without a step."""
    rows, index = values.double().flatten(), budget_index.flatten()
    sums = torch.zeros(num_budgets, dtype=torch.float64).index_add_(0, index, rows)
    return sums / torch.bincount(index, minlength=num_budgets)


def summarise(
    batch: RolloutBatch,
    budgets: tuple[float, ...],
    multipliers: Tensor,
    update: UpdateStats,
    iteration: int,
    steps: int,
) -> IterationStats:
    """The statistics of one iteration."""
    count = len(budgets)
    counts = torch.bincount(batch.budget_index.flatten(), minlength=count).tolist()
    rewards = mean_by_budget(batch.rewards, batch.budget_index, count).tolist()
    costs = mean_by_budget(batch.costs, batch.budget_index, count).tolist()
    shares = torch.bincount(batch.actions.flatten(), minlength=NUM_ACTIONS) / batch.actions.numel()
    return IterationStats(
        iteration=iteration,
        steps=steps,
        reward=float(batch.rewards.double().mean()),
        cost=float(batch.costs.double().mean()),
        budgets=tuple(
            BudgetStats(budget, seen, reward if seen else None, cost if seen else None, multiplier)
            for budget, seen, reward, cost, multiplier in zip(
                budgets, counts, rewards, costs, multipliers.tolist(), strict=True
            )
        ),
        actions=tuple(shares.tolist()),
        episodes=int(batch.done.sum()),
        update=update,
    )


class Recorder:
    """Writes statistics into a directory, on from an iteration.

    Args:
        directory: gets `statistics.jsonl` and `tensorboard/`.
        iteration: the first that will be written; what an interrupted run wrote from there on is
            dropped.
    """

    def __init__(self, directory: Path, iteration: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / STATISTICS_FILE
        kept = _lines_before(path, iteration)
        draft = path.with_name(f".{path.name}")
        draft.write_text("".join(kept))
        draft.replace(path)
        self._file = path.open("a")
        self._writer = SummaryWriter(str(directory / TENSORBOARD_DIR), purge_step=iteration)

    def write(self, stats: IterationStats, timing: Mapping[str, float]) -> None:
        """Keep one iteration; timing goes to TensorBoard alone, as no two runs agree on it."""
        values = asdict(stats)
        self._file.write(json.dumps(values, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in (*_scalars(values), *timing.items()):
            self._writer.add_scalar(name, value, stats.iteration)

    def close(self) -> None:
        """Finish both."""
        self._file.close()
        self._writer.close()


def _lines_before(path: Path, iteration: int) -> list[str]:
    if not path.exists():
        return []
    # The last line may be cut off where the machine stopped; it lies after the checkpoint.
    return path.read_text().splitlines(keepends=True)[:iteration]


def _scalars(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Names for TensorBoard: `budgets/2/cost`, `actions/3`, `update/approx_kl`."""
    for key, value in values.items():
        if key == "budgets":
            for row in value:
                yield from _scalars(row, f"budgets/{row['budget']:g}/")
        elif key == "actions":
            yield from ((f"actions/{index}", share) for index, share in enumerate(value))
        elif isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif value is not None and key not in ("iteration", "budget"):
            yield f"{prefix}{key}", float(value)
