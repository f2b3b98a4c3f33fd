"""The bench: runs one configuration of a gradient step after another on the same text."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ponderttt.adaptation.actions import Action, CostModel, CostModelName
from ponderttt.adaptation.params import check_budget
from ponderttt.engine.config import EngineConfig, TTTDefaults
from ponderttt.engine.core import EngineCore
from ponderttt.errors import InvalidRequestError
from training.analysis.schedules import FrontLoaded
from training.environments.budgeted import BudgetRules
from training.live import Method, play_live
from training.live_results import LiveResult, by_repository, cut_torn_end, mean_costs
from training.rollouts.episodes import Episode
from training.rollouts.lanes import TrunkCache
from training.trials import Trial

log = logging.getLogger(__name__)

#: A configuration that makes any repository worse by more than this is out.
WORST = 0.005


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What a trial came to.

    Args:
        trial: as `Trial.to_dict`.
        change: by what it differs from the best before it.
        loss, off: nats per token, with and without learning; means over repositories.
        by_repository: relative change of the loss, below 0 where learning helped.
        measured_cost, nominal_cost: mean per chunk, × forward.
        update_cost: measured, of one chunk with the trial's action.
        bench: digest of model, text and budget, without which figures can't be compared.
    """

    trial: dict[str, Any]
    change: str
    loss: float
    off: float
    by_repository: dict[str, float]
    measured_cost: float
    nominal_cost: float
    update_cost: float
    bench: str

    @property
    def relative(self) -> float:
        """Mean relative change of the loss over repositories."""
        return float(np.mean(list(self.by_repository.values())))

    @property
    def safe(self) -> bool:
        """No repository is much worse than without learning."""
        return max(self.by_repository.values()) <= WORST


class Bench:
    """Runs trials on one model, and remembers them in a file.

    Args:
        core: gives model, tokenizer and name.
        episodes: the text; cut into chunks of each trial's size.
        budget: mean cost per chunk, × forward.
        cost_model: in which the budget is counted.
        output: JSON lines of results; what is there of the same model, text and budget is not run
            again.
    Raises:
        InvalidRequestError: no episode, a budget out of range, or the output cannot be written or
            read.
    """

    def __init__(
        self,
        core: EngineCore,
        episodes: Sequence[Episode],
        budget: float,
        output: Path,
        cost_model: CostModelName = "measured",
    ) -> None:
        check_budget("budget", budget)
        if not episodes:
            raise InvalidRequestError(
                "corpora", "no training repository is large enough for two chunks; add some"
            )
        self._core = core
        self._episodes = episodes
        self._budget = budget
        self._cost_model: CostModelName = cost_model
        self._output = output
        text = [core.model_name, cost_model, budget, [[e.name, e.documents] for e in episodes]]
        self._digest = hashlib.sha256(json.dumps(text).encode()).hexdigest()[:24]
        self._known: dict[str, TrialResult] = {}
        self._off: dict[str, float] = {}
        # By the first adaptive block: below it nothing differs between trials.
        self._trunks: dict[int, TrunkCache] = {}
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.touch()
            cut_torn_end(output)
            lines = output.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequestError("output", f"{output} cannot be written: {error}") from error
        for line in lines:
            try:
                result = TrialResult(**json.loads(line))
            except (ValueError, TypeError):
                log.warning("%s: a damaged line is left out", output)
                continue
            if result.bench == self._digest:
                self._known[json.dumps(result.trial, sort_keys=True)] = result

    def run(self, trial: Trial, change: str) -> TrialResult:
        """Play a trial, or recall it."""
        known = self._known.get(trial.key())
        if known is not None:
            return known
        core = self._engine(trial)
        measured = core.measure_costs(trial.chunk_size)
        rules = BudgetRules((self._budget,), core.costs, self._cost_model)
        method = Method("learning", FrontLoaded(trial.action), self._budget)
        episodes = [replace(each, chunk_size=trial.chunk_size) for each in self._episodes]
        played = self._play(core, episodes, method, rules)
        result = TrialResult(
            trial=trial.to_dict(),
            change=change,
            loss=_mean_loss(played),
            off=float(np.mean(list(self._base(core, episodes, rules).values()))),
            by_repository=self._relative(played),
            measured_cost=_mean_cost(played, core.costs, "measured"),
            nominal_cost=_mean_cost(played, core.costs, "nominal"),
            update_cost=measured[trial.action],
            bench=self._digest,
        )
        self._known[trial.key()] = result
        with self._output.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        return result

    def _engine(self, trial: Trial) -> EngineCore:
        config = EngineConfig(
            # One session at a time, and one for the measurement of the costs.
            adapter_slots=2,
            lora=trial.lora,
            ttt=TTTDefaults(gate="off", chunk_size=trial.chunk_size),
        )
        return EngineCore(
            self._core.model, self._core.tokenizer, self._core.model_name, config, trial.rule
        )

    def _play(
        self, core: EngineCore, episodes: Sequence[Episode], method: Method, rules: BudgetRules
    ) -> list[LiveResult]:
        trunks = self._trunks.setdefault(core.bank.layout.first_layer, TrunkCache())
        return play_live(core, episodes, [method], rules, None, trunks=trunks)

    def _base(
        self, core: EngineCore, episodes: Sequence[Episode], rules: BudgetRules
    ) -> dict[str, float]:
        if not self._off:
            # The same for all trials: without updates nothing depends on chunks or shape.
            off = Method("off", FrontLoaded(Action.SKIP), None)
            self._off = by_repository(self._play(core, episodes, off, rules))
        return self._off

    def _relative(self, played: Sequence[LiveResult]) -> dict[str, float]:
        return {name: loss / self._off[name] - 1 for name, loss in by_repository(played).items()}


def _mean_loss(results: Sequence[LiveResult]) -> float:
    return float(np.mean(list(by_repository(results).values())))


def _mean_cost(results: Sequence[LiveResult], costs: Mapping[str, CostModel], name: str) -> float:
    """× forward, per chunk."""
    chunks = [len(result.actions) for result in results]
    return float(np.average([mean_costs(each, costs)[name] for each in results], weights=chunks))
