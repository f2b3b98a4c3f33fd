"""The cheap environment: episodes replayed from full-information traces.

The gain of every action from the recorded state is known, so an episode costs no model at all.
What it leaves out: the recorded states are those of the behaviour that made the trace, not of the
policy in training, so gains of one chunk do not depend on what was done with the chunks before.
The live environment has no such fault and is ten thousand times as slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.features import FEATURE_NAMES
from ponderttt.errors import InvalidRequestError
from ponderttt.sessions.session import Session
from training.analysis.gains import TraceEpisode
from training.environments.budgeted import (
    HISTORY_COLUMNS,
    BudgetRules,
    ShuffledDeck,
    as_actions,
    bookkeeping_session,
    check_digest,
    digest_of,
    draw,
)
from training.ppo.environment import Observation, State, StepResult


@dataclass(slots=True)
class _Run:
    """One environment's episode."""

    episode: int
    budget: int
    session: Session
    whole: bool
    position: int = 0
    taken: list[int] = field(default_factory=list)


class TraceEnv:
    """N episodes at a time out of recorded ones; see `VectorEnv`.

    Args:
        episodes: each of at least one chunk that can be learned.
        rules: of the budgets.
        num_envs: N.
        reward_scale: rewards are gains times this, nats per token.
        whole_share: share of the episodes whose text comes in one request, so that all of it is
            known to follow; the others come document by document.
        seed: of the order of episodes, their budgets and how they come.
    Raises:
        InvalidRequestError: no episode that can be used, or a value out of range.
    """

    def __init__(
        self,
        episodes: Sequence[TraceEpisode],
        rules: BudgetRules,
        num_envs: int,
        *,
        reward_scale: float = 1.0,
        whole_share: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not 0.0 <= whole_share <= 1.0:
            raise InvalidRequestError("whole_share", f"{whole_share} lies outside [0, 1]")
        self._episodes = [episode for episode in episodes if bool(episode.learnable.any())]
        if not self._episodes:
            raise InvalidRequestError("episodes", "none has a chunk that can be learned")
        if num_envs < 1:
            raise InvalidRequestError("num_envs", f"{num_envs} is below 1")
        self._rules = rules
        self._scale = reward_scale
        self._whole_share = whole_share
        self._generator = torch.Generator().manual_seed(seed)
        self._deck = ShuffledDeck(len(self._episodes), self._generator)
        self._features = [torch.tensor(e.features).float() for e in self._episodes]
        self._digest = digest_of(
            part for e in self._episodes for part in (e.name.encode(), e.gains.tobytes())
        )
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
        self._runs = [self._begin() for _ in range(self.num_envs)]
        return self._observe()

    def step(self, actions: Tensor) -> StepResult:
        """One chunk of every episode; what a budget does not pay for is cut down."""
        rewards, costs, done = [], [], []
        for index, wanted in enumerate(as_actions(actions, self.num_envs)):
            run = self._runs[index]
            episode = self._episodes[run.episode]
            budget, ahead = self.budgets[run.budget], self._ahead(run)
            action = self._rules.cut(wanted, run.session, budget, ahead)
            rewards.append(float(episode.gains[run.position, action]) * self._scale)
            costs.append(self._rules.cost(action))
            self._advance(run, action)
            over = run.position >= len(episode.gains)
            done.append(over)
            if over:
                self._runs[index] = self._begin()
        return StepResult(
            self._observe(), torch.tensor(rewards), torch.tensor(costs), torch.tensor(done)
        )

    def _begin(self) -> _Run:
        episode = self._deck.deal()
        budget = draw(self._generator, self.num_budgets)
        whole = float(torch.rand((), generator=self._generator)) < self._whole_share
        run = _Run(episode, budget, bookkeeping_session("trace"), whole)
        self._skip_unlearnable(run)
        return run

    def _advance(self, run: _Run, action: Action) -> None:
        run.taken.append(int(action))
        self._charge(run, action)
        self._skip_unlearnable(run)

    def _charge(self, run: _Run, action: Action) -> None:
        loss = float(self._episodes[run.episode].losses[run.position])
        self._rules.charge(run.session, action, loss)
        run.position += 1

    def _skip_unlearnable(self, run: _Run) -> None:
        learnable = self._episodes[run.episode].learnable
        while run.position < len(learnable) and not learnable[run.position]:
            self._charge(run, Action.SKIP)

    def _observe(self) -> Observation:
        rows, allowed = [], []
        for run in self._runs:
            budget = self.budgets[run.budget]
            ahead = self._ahead(run)
            row = self._features[run.episode][run.position].clone()
            row[HISTORY_COLUMNS] = torch.tensor(self._rules.history(run.session, budget, ahead))
            rows.append(row)
            allowed.append(self._rules.allowed(run.session, budget, ahead))
        index = torch.tensor([run.budget for run in self._runs])
        return Observation(torch.stack(rows), torch.stack(allowed), index)

    def _ahead(self, run: _Run) -> int:
        """Chunks that are sure to follow, as far as the session can know."""
        episode = self._episodes[run.episode]
        if run.whole:
            return len(episode.gains) - run.position - 1
        return int(episode.near[run.position])

    def state_dict(self) -> State:
        """Generator, deck, and every episode's actions so far."""
        return {
            "episodes": self._digest,
            "generator": self._generator.get_state(),
            "deck": list(self._deck.waiting),
            "runs": [
                {
                    "episode": run.episode,
                    "budget": run.budget,
                    "whole": run.whole,
                    "taken": list(run.taken),
                }
                for run in self._runs
            ],
        }

    def load_state_dict(self, state: State) -> None:
        """Go on where `state_dict` was called, by playing the actions again.

        Raises:
            InvalidRequestError: it was called with other episodes.
        """
        check_digest(state["episodes"], self._digest)
        self._generator.set_state(state["generator"])
        self._deck.waiting = [int(card) for card in state["deck"]]
        self._runs = []
        for kept in state["runs"]:
            session = bookkeeping_session("trace")
            run = _Run(int(kept["episode"]), int(kept["budget"]), session, bool(kept["whole"]))
            self._skip_unlearnable(run)
            for action in kept["taken"]:
                self._advance(run, Action(int(action)))
            self._runs.append(run)
