"""The loop: gather a rollout, steer the multipliers, learn, record, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ponderttt.errors import InvalidRequestError
from training.ppo.checkpoint import (
    CheckpointError,
    checkpoint_path,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from training.ppo.config import PPOConfig, whole
from training.ppo.environment import State, VectorEnv
from training.ppo.learner import Learner
from training.ppo.network import ActorCritic
from training.ppo.pid import PIDController
from training.ppo.recorder import IterationStats, Recorder, mean_by_budget, summarise
from training.ppo.rollout import InProcessSource, RolloutSource

CHECKPOINT_DIR = "checkpoints"


def derived_seeds(seed: int, count: int) -> list[int]:
    """Independent seeds from one; the first three are the trainer's own."""
    return [int(value) for value in np.random.SeedSequence(seed).generate_state(count)]


class Trainer:
    """Trains a policy to gain the most reward within each budget.

    Args:
        env: what to act in: an environment, which is stepped in this process, or a source that
            gathers rollouts elsewhere.
        config: settings of PPO.
        controller: steers the multipliers; must have the environment's budgets.
        network: start from this one; default: a fresh one from `config.seed`.
        output: directory for checkpoints and statistics; None: nothing is written.
        checkpoint_every: iterations between checkpoints; the last is always kept.
        keep_checkpoints: older ones are deleted.
        progress: show a progress bar.
        on_iteration: called with every iteration's statistics, after they are written.
    Raises:
        InvalidRequestError: budgets or network do not fit.
    """

    def __init__(
        self,
        env: VectorEnv | RolloutSource,
        config: PPOConfig,
        controller: PIDController,
        *,
        network: ActorCritic | None = None,
        output: Path | None = None,
        checkpoint_every: int = 10,
        keep_checkpoints: int = 3,
        progress: bool = True,
        on_iteration: Callable[[IterationStats], None] | None = None,
    ) -> None:
        whole("checkpoint_every", checkpoint_every, 1)
        whole("keep_checkpoints", keep_checkpoints, 1)
        network_seed, learner_seed, source_seed = derived_seeds(config.seed, 3)
        if isinstance(env, RolloutSource):
            self.source: RolloutSource = env
        else:
            self.source = InProcessSource(env, config.num_steps, config.hidden_sizes, source_seed)
        self.network = network or ActorCritic(config.hidden_sizes, network_seed)
        if self.network.hidden_sizes != config.hidden_sizes:
            raise InvalidRequestError(
                "network", f"has layers {self.network.hidden_sizes}, not {config.hidden_sizes}"
            )
        if controller.budgets != self.source.budgets:
            raise InvalidRequestError(
                "controller", f"has budgets {controller.budgets}, not {self.source.budgets}"
            )
        self.config = config
        self.controller = controller
        self.learner = Learner(self.network, config, learner_seed)
        self.iteration = 0
        self.steps = 0
        self._output = output
        self._every, self._keep = checkpoint_every, keep_checkpoints
        self._progress, self._on_iteration = progress, on_iteration

    # --- the loop ---------------------------------------------------------------------------------

    def train(self) -> list[IterationStats]:
        """Run the iterations that are left.

        Returns:
            Their statistics.
        Raises:
            InvalidRequestError: the output directory cannot be used, or holds another run.
        """
        recorder = self._open_recorder()
        history: list[IterationStats] = []
        left = range(self.iteration, self.config.iterations)
        bar = tqdm(left, "ppo", self.config.iterations, initial=self.iteration,
                   unit="it", disable=not self._progress)  # fmt: skip
        try:
            for _ in bar:
                started = time.perf_counter()
                stats, gathered = self._iterate(started)
                history.append(stats)
                if recorder is not None:
                    recorder.write(stats, self._timing(started, gathered))
                bar.set_postfix_str(_summary(stats), refresh=False)
                if self.iteration % self._every == 0 or self.iteration == self.config.iterations:
                    self.save()
                if self._on_iteration is not None:
                    self._on_iteration(stats)
        finally:
            bar.close()
            if recorder is not None:
                recorder.close()
        return history

    def _iterate(self, started: float) -> tuple[IterationStats, float]:
        """One iteration; and the seconds that its rollout took."""
        normaliser = self.network.normaliser
        batch = self.source.collect(
            {name: tensor.detach() for name, tensor in self.network.state_dict().items()}
        )
        gathered = time.perf_counter() - started
        first = normaliser.empty
        if first:
            # Nothing can be learned from features of unknown scale. The actions were sampled
            # otherwise, but almost uniformly, and their probabilities are on record.
            normaliser.update(batch.features)
        budgets = self.source.budgets
        costs = mean_by_budget(batch.costs, batch.budget_index, len(budgets))
        multipliers = self.controller.update(costs)
        update = self.learner.update(batch, multipliers, self.iteration)
        if not first:
            # Only now: the rollout's policy must not change before it is learned from.
            normaliser.update(batch.features)
        self.steps += batch.rewards.numel()
        stats = summarise(batch, budgets, multipliers, update, self.iteration, self.steps)
        self.iteration += 1
        return stats, gathered

    def _timing(self, started: float, gathered: float) -> dict[str, float]:
        seconds = time.perf_counter() - started
        return {
            "time/rollout_seconds": gathered,
            "time/update_seconds": seconds - gathered,
            "time/steps_per_second": self.source.num_envs * self.config.num_steps / seconds,
        }

    def _open_recorder(self) -> Recorder | None:
        if self._output is None:
            return None
        if self.iteration == 0 and checkpoints(self._output / CHECKPOINT_DIR):
            raise InvalidRequestError(
                "output", f"{self._output} holds a run already; resume it or choose another"
            )
        try:
            return Recorder(self._output, self.iteration)
        except OSError as error:
            raise InvalidRequestError("output", f"cannot be written: {error}") from error

    # --- checkpoints ------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint and delete those that are too old; nothing without an output."""
        if self._output is None:
            return
        directory = self._output / CHECKPOINT_DIR
        save_checkpoint(checkpoint_path(directory, self.iteration), self.state_dict())
        for path in checkpoints(directory)[: -self._keep]:
            path.unlink()

    def resume(self, path: Path | None = None) -> int:
        """Go on from a checkpoint, exactly as if the run had never stopped.

        Args:
            path: default: the newest in the output directory.
        Returns:
            The iterations already done; 0, and nothing is changed, where there is no checkpoint.
        Raises:
            CheckpointError: it is damaged, or of a run with other settings; says which.
        """
        if path is None:
            found = checkpoints(self._output / CHECKPOINT_DIR) if self._output else []
            if not found:
                return 0
            path = found[-1]
        state = load_checkpoint(path)
        try:
            self.load_state_dict(state)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: does not fit this run: {error}") from error
        return self.iteration

    def state_dict(self) -> State:
        """Everything that the rest of the run depends on, and the settings it was made with."""
        return {
            "settings": self._settings(),
            "iteration": self.iteration,
            "steps": self.steps,
            "learner": self.learner.state_dict(),
            "controller": self.controller.state_dict(),
            "source": self.source.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on where `state_dict` was called.

        Raises:
            CheckpointError: the state is of a run with other settings. `iterations` alone may
                differ, so that a run can be prolonged; settings that decay then decay otherwise.
        """
        mine, theirs = self._settings(), state["settings"]
        for key in mine:
            if key != "ppo.iterations" and theirs.get(key) != mine[key]:
                raise CheckpointError(f"{key} is {theirs.get(key)!r}, this run has {mine[key]!r}")
        self.learner.load_state_dict(state["learner"])
        self.controller.load_state_dict(state["controller"])
        self.source.load_state_dict(state["source"])
        self.iteration, self.steps = int(state["iteration"]), int(state["steps"])

    def _settings(self) -> dict[str, Any]:
        """Flat, and as they look after JSON."""
        settings: dict[str, Any] = {f"ppo.{k}": v for k, v in asdict(self.config).items()}
        settings["ppo.hidden_sizes"] = list(self.config.hidden_sizes)
        settings |= {f"pid.{k}": v for k, v in asdict(self.controller.config).items()}
        return settings | {
            "budgets": list(self.controller.budgets),
            "num_envs": self.source.num_envs,
        }


def _summary(stats: IterationStats) -> str:
    costs = " ".join(
        f"{row.cost:.2f}/{row.budget:g}" for row in stats.budgets if row.cost is not None
    )
    return f"reward {stats.reward:.4g} cost {costs} kl {stats.update.approx_kl:.3f}"
