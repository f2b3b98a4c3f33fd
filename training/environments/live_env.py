"""The live environment: sessions that really learn, on the engine's own phases.

The reward of an action is what the session saves on the chunk that follows: the loss that the base
model has there, less the session's own, in nats per token. An episode's rewards add up to all that
its session saved, so an action is credited (through the discounted sum) with everything it does
for the text behind it, and an update that only memorises its chunk earns nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.features import FEATURE_NAMES
from ponderttt.engine.core import EngineCore
from ponderttt.errors import InvalidRequestError
from training.environments.budgeted import (
    BudgetRules,
    ShuffledDeck,
    as_actions,
    check_digest,
    digest_of,
    draw,
)
from training.ppo.environment import Observation, State, StepResult
from training.rollouts.episodes import Episode
from training.rollouts.lanes import Lane, Lanes
from training.rollouts.snapshots import restore, snapshot


@dataclass(slots=True)
class _Run:
    """One environment's episode; `entries` are the actions and losses of its ledger."""

    episode: int
    budget: int
    lane: Lane
    entries: list[tuple[int, float | None]] = field(default_factory=list)


class LiveEnv:
    """N sessions that step together; see `VectorEnv`.

    Args:
        core: its bank has N slots, and one more for the pass without adaptation.
        episodes: each of at least one chunk that is long enough to be learned.
        rules: of the budgets.
        num_envs: N.
        reward_scale: rewards are nats per token times this.
        seed: of the order of episodes and of their budgets.
    Raises:
        InvalidRequestError: no episode that can be used, or too small a bank.
    """

    def __init__(
        self,
        core: EngineCore,
        episodes: Sequence[Episode],
        rules: BudgetRules,
        num_envs: int,
        *,
        reward_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        self._lanes = Lanes(core)
        self._episodes = [episode for episode in episodes if self._lanes.learnable(episode)]
        if not self._episodes:
            raise InvalidRequestError("episodes", "none has a chunk that can be learned")
        if not 1 <= num_envs < core.bank.capacity:
            raise InvalidRequestError(
                "num_envs",
                f"{num_envs} lies outside [1, {core.bank.capacity - 1}]; the bank has "
                f"{core.bank.capacity} slots (adapter_slots) and one must be free",
            )
        self._core = core
        self._rules = rules
        self._scale = reward_scale
        self._generator = torch.Generator().manual_seed(seed)
        self._deck = ShuffledDeck(len(self._episodes), self._generator)
        self._digest = digest_of(
            repr((e.name, e.chunk_size, e.documents)).encode() for e in self._episodes
        )
        self._base: dict[int, list[float | None]] = {}
        self._runs: list[_Run] = []
        self.num_envs = num_envs
        self.num_features = len(FEATURE_NAMES)
        self.num_actions = len(Action)

    @property
    def budgets(self) -> tuple[float, ...]:
        """K, × forward."""
        return self._rules.budgets

    @property
    def num_budgets(self) -> int:
        """K."""
        return len(self._rules.budgets)

    def reset(self) -> Observation:
        """A new episode everywhere."""
        self.close()
        for _ in range(self.num_envs):
            self._runs.append(self._begin())
        self._read(self._runs)
        return self._observe()

    def close(self) -> None:
        """Give the bank's slots back."""
        for run in self._runs:
            self._lanes.close(run.lane)
        self._runs = []

    def step(self, actions: Tensor) -> StepResult:
        """Learn the chunks as told, and read the next ones.

        What a budget does not pay for is cut down.
        """
        chosen = [
            self._rules.cut(action, run.lane.session, self.budgets[run.budget], run.lane.ahead)
            for run, action in zip(self._runs, as_actions(actions, self.num_envs), strict=True)
        ]
        costs = [self._rules.cost(action) for action in chosen]
        self._learn(chosen)
        rewards, done = [0.0] * self.num_envs, [False] * self.num_envs
        waiting = list(range(self.num_envs))
        # A chunk that cannot be learned is no decision: its saving goes to the one before.
        while waiting:
            reading = []
            for index in waiting:
                if self._runs[index].lane.done:
                    done[index] = True
                    self._lanes.close(self._runs[index].lane)
                    self._runs[index] = self._begin()
                reading.append(self._runs[index])
            self._advance(reading)
            for index in waiting:
                if not done[index]:
                    rewards[index] += self._saving(self._runs[index]) * self._scale
            waiting = [index for index in waiting if not self._decides(self._runs[index])]
        return StepResult(
            self._observe(), torch.tensor(rewards), torch.tensor(costs), torch.tensor(done)
        )

    # --- episodes ----------------------------------------------------------------------------

    def _begin(self) -> _Run:
        episode = self._deck.deal()
        if episode not in self._base:
            self._base[episode] = self._base_losses(self._episodes[episode])
        budget = draw(self._generator, self.num_budgets)
        return _Run(episode, budget, self._lanes.open(self._episodes[episode]))

    def _base_losses(self, episode: Episode) -> list[float | None]:
        lane = self._lanes.open(episode)
        losses: list[float | None] = []
        try:
            while not lane.done:
                self._lanes.read([lane])
                losses.append(_loss(lane))
        finally:
            self._lanes.close(lane)
        return losses

    def _read(self, runs: Sequence[_Run]) -> None:
        """Read on until every run has a chunk to decide about."""
        waiting = list(runs)
        while waiting:
            self._advance(waiting)
            waiting = [run for run in waiting if not self._decides(run)]

    def _advance(self, runs: Sequence[_Run]) -> None:
        self._lanes.read([run.lane for run in runs])
        for run in runs:
            if not self._decides(run):
                self._enter(run, Action.SKIP)

    def _decides(self, run: _Run) -> bool:
        return self._lanes.learns(run.lane)

    def _saving(self, run: _Run) -> float:
        base, own = self._base[run.episode][run.lane.position - 1], _loss(run.lane)
        return base - own if base is not None and own is not None else 0.0

    def _learn(self, actions: Sequence[Action]) -> None:
        learning = [
            (run.lane, action)
            for run, action in zip(self._runs, actions, strict=True)
            if action is not Action.SKIP
        ]
        if learning:
            self._lanes.write([lane for lane, _ in learning], [action for _, action in learning])
        for run, action in zip(self._runs, actions, strict=True):
            self._enter(run, action)

    def _enter(self, run: _Run, action: Action) -> None:
        loss = _loss(run.lane)
        self._rules.charge(run.lane.session, action, loss)
        run.entries.append((int(action), loss))

    def _observe(self) -> Observation:
        rows, allowed = [], []
        for run in self._runs:
            session, budget, ahead = run.lane.session, self.budgets[run.budget], run.lane.ahead
            costs = self._rules.costs[self._rules.cost_model]
            history = session.history(budget, session.ledger.credit(costs, budget), ahead)
            rows.append(self._lanes.features(run.lane, history))
            allowed.append(self._rules.allowed(session, budget, ahead))
        index = torch.tensor([run.budget for run in self._runs])
        return Observation(torch.stack(rows), torch.stack(allowed), index)

    # --- checkpoints -------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Everything, fast weights and caches of the adaptive blocks included."""
        return {
            "episodes": self._digest,
            "generator": self._generator.get_state(),
            "deck": list(self._deck.waiting),
            "runs": [
                {
                    "episode": run.episode,
                    "budget": run.budget,
                    "actions": [action for action, _ in run.entries],
                    "losses": [loss for _, loss in run.entries],
                    "lane": snapshot(self._core, run.lane),
                }
                for run in self._runs
            ],
        }

    def load_state_dict(self, state: State) -> None:
        """Go on where `state_dict` was called.

        Raises:
            InvalidRequestError: it was called with other episodes.
        """
        check_digest(state["episodes"], self._digest)
        self.close()
        self._generator.set_state(state["generator"])
        self._deck.waiting = [int(card) for card in state["deck"]]
        for kept in state["runs"]:
            self._runs.append(self._restore(kept))

    def _restore(self, kept: dict[str, Any]) -> _Run:
        episode = int(kept["episode"])
        if episode not in self._base:
            self._base[episode] = self._base_losses(self._episodes[episode])
        lane = self._lanes.open(self._episodes[episode])
        run = _Run(episode, int(kept["budget"]), lane)
        restore(self._core, self._lanes, lane, kept["lane"])
        for action, loss in zip(kept["actions"], kept["losses"], strict=True):
            self._rules.charge(lane.session, Action(action), loss)
            run.entries.append((action, loss))
        return run


def _loss(lane: Lane) -> float | None:
    scores = lane.scores
    return scores.loss if scores is not None and scores.losses.numel() else None
