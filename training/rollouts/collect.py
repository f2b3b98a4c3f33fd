"""Collecting full-information traces, resumably."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.observation import History
from ponderttt.engine.core import EngineCore
from ponderttt.errors import InvalidRequestError
from ponderttt.fast_weights.bank import AdapterState
from training.rollouts.episodes import Episode
from training.rollouts.lanes import Lane, Lanes, Outcome
from training.rollouts.traces import TraceRecord, TraceWriter

#: SKIP, UPDATE_1, UPDATE_2, UPDATE_4: sessions that have learned much and little are both seen.
BEHAVIOUR = (0.45, 0.4, 0.11, 0.04)


@dataclass(frozen=True, slots=True)
class CollectConfig:
    """How traces are collected.

    Args:
        lanes: episodes that run at once.
        peek_tokens: rows of the text that follows, on which an outcome is measured, per place.
        later_places: later documents that are looked at, besides the next chunk.
        behaviour: probability with which each action is really taken.
        seed: of the actions, and of the later documents that are looked at.
    Raises:
        InvalidRequestError: a value is out of range.
    """

    lanes: int = 4
    peek_tokens: int = 128
    later_places: int = 2
    behaviour: tuple[float, float, float, float] = BEHAVIOUR
    seed: int = 0

    def __post_init__(self) -> None:
        if self.lanes < 1:
            raise InvalidRequestError("lanes", f"{self.lanes} is below 1")
        if self.peek_tokens < 1:
            raise InvalidRequestError("peek_tokens", f"{self.peek_tokens} is below 1")
        if self.later_places < 0:
            raise InvalidRequestError("later_places", f"{self.later_places} is below 0")
        shares = self.behaviour
        # So written that what is no number fails, too.
        usual = all(share >= 0 for share in shares) and abs(sum(shares) - 1) <= 1e-6
        if len(shares) != len(Action) or not usual:
            raise InvalidRequestError(
                "behaviour", f"{self.behaviour} must be four probabilities that add up to 1"
            )


def collect(
    core: EngineCore,
    episodes: Sequence[Episode],
    config: CollectConfig,
    writer: TraceWriter,
    progress: Callable[[int], None] = lambda chunks: None,
) -> None:
    """Run the episodes to their ends and append a record per chunk.

    Episodes that the file holds in part are first run to where they stopped, by the actions
    recorded there; that costs a read and the action's own steps per chunk.

    Args:
        core: its bank has a slot for every lane.
        episodes: to collect.
        config: see there.
        writer: of the file; what it holds already is not collected again.
        progress: called with the number of chunks that are done since the last call.
    """
    done: dict[str, list[TraceRecord]] = defaultdict(list)
    for record in writer.records:
        done[record.episode].append(record)
    progress(len(writer.records))
    waiting = [e for e in episodes if len(done[e.name]) < len(e.chunks)]
    waiting.reverse()
    lanes = Lanes(core)
    running: list[Lane] = []
    collector = _Collector(lanes, config)
    try:
        while waiting or running:
            while waiting and len(running) < config.lanes:
                running.append(lanes.open(waiting.pop()))
                collector.catch_up(running[-1], done[running[-1].episode.name])
            records = collector.step(running)
            writer.append(records)
            progress(len(records))
            for lane in [lane for lane in running if lane.done]:
                lanes.close(lane)
                running.remove(lane)
    finally:
        for lane in running:
            lanes.close(lane)


class _Collector:
    def __init__(self, lanes: Lanes, config: CollectConfig) -> None:
        self._lanes = lanes
        self._config = config

    def catch_up(self, lane: Lane, records: Sequence[TraceRecord]) -> None:
        for record in records:
            action = Action(record.action)
            self._lanes.read([lane])
            if action is not Action.SKIP and record.failures[action] is None:
                # Not judged again: the record says that it was kept.
                (outcome,) = self._lanes.write([lane], [action], keep_states=True)
                self._lanes.commit(lane, outcome.states[action.steps - 1])
            self._lanes.record(lane, action, budgeted=False)

    def step(self, lanes: Sequence[Lane]) -> list[TraceRecord]:
        """One chunk of every lane."""
        self._lanes.read(lanes)
        features = [self._lanes.features(lane, self._history(lane)) for lane in lanes]
        learners = [lane for lane in lanes if self._lanes.learns(lane)]
        outcomes = self._lanes.write(learners, [Action.UPDATE_4] * len(learners), keep_states=True)
        found = {id(lane): o for lane, o in zip(learners, outcomes, strict=True)}
        judged = {
            id(lane): self._judge(lane, found[id(lane)]) for lane in lanes if id(lane) in found
        }
        after = self._peek(learners, judged)
        records = []
        for lane, row in zip(lanes, features, strict=True):
            records.append(self._record(lane, row, judged.get(id(lane)), after.get(id(lane))))
        return records

    def _history(self, lane: Lane) -> History:
        # Replayed under other actions and budgets, these four features are computed anew.
        return lane.session.history(None, 0.0, lane.ahead)

    def _judge(self, lane: Lane, outcome: Outcome) -> _Judged:
        """The state and the chunk's loss after each of the four actions."""
        bank, session = self._lanes.core.bank, lane.session
        before = bank.state(session.slot, session.owner)
        states, own = [before], [outcome.losses[0]]
        failures: list[str | None] = [None]
        for action in list(Action)[1:]:
            steps = action.steps
            if len(outcome.losses) <= steps:
                failures.append(outcome.failure or "not_finite")
            else:
                verdict = self._lanes.core.writer.verdict(
                    outcome.losses[: steps + 1], outcome.states[steps - 1].weights
                )
                failures.append(verdict)
            failed = failures[-1] is not None
            states.append(before if failed else outcome.states[steps - 1])
            own.append(own[0] if failed else outcome.losses[steps])
        return _Judged(states, own, failures)

    def _peek(self, lanes: Sequence[Lane], judged: dict[int, _Judged]) -> dict[int, _After]:
        """What follows each lane's chunk, after each of the four actions."""
        requests: list[tuple[Lane, int, Tensor]] = []
        places: list[tuple[_After, str, Action]] = []
        found: dict[int, _After] = {}
        for lane in lanes:
            after = found[id(lane)] = _After()
            if lane.done:
                continue
            later = [("later", index) for index in self._later(lane)]
            for place, index in [("next", lane.position), *later]:
                if (count := self._predicted(lane, index)) < 1:
                    continue
                after.tokens[place] += count
                after.losses[place] = [0.0] * len(Action)
                for action, state in zip(Action, judged[id(lane)].states, strict=True):
                    requests.append((lane, index, state.weights))
                    places.append((after, place, action))
        losses = self._lanes.peek(requests, self._config.peek_tokens) if requests else []
        for (after, place, action), loss in zip(places, losses, strict=True):
            after.losses[place][action] += loss
        return found

    def _predicted(self, lane: Lane, index: int) -> int:
        _, start, end = lane.episode.chunks[index]
        return min(end - start - 1, self._config.peek_tokens)

    def _later(self, lane: Lane) -> list[int]:
        """Beginnings of later documents, none of them the next chunk."""
        starts = [
            index
            for index, (_, start, _) in enumerate(lane.episode.chunks)
            if start == 0 and index > lane.position
        ]
        count = min(self._config.later_places, len(starts))
        return self._draw(lane, "later").sample(starts, count)

    def _record(
        self, lane: Lane, features: Tensor, judged: _Judged | None, after: _After | None
    ) -> TraceRecord:
        action = Action.SKIP
        if judged is not None:
            weights = self._config.behaviour
            action = self._draw(lane, "action").choices(list(Action), weights)[0]
            if action is not Action.SKIP and judged.failures[action] is None:
                self._lanes.commit(lane, judged.states[action])
        scores = lane.scores
        self._lanes.record(lane, action, budgeted=False)
        return TraceRecord(
            episode=lane.episode.name,
            index=lane.position - 1,
            tokens=lane.tokens,
            loss=scores.loss if scores is not None and scores.losses.numel() else None,
            features=tuple(features.tolist()),
            own=tuple(judged.own) if judged is not None else (),
            next=tuple(after.losses["next"]) if after is not None else (),
            next_tokens=after.tokens["next"] if after is not None else 0,
            later=tuple(after.losses["later"]) if after is not None else (),
            later_tokens=after.tokens["later"] if after is not None else 0,
            near=lane.near,
            far=lane.ahead - lane.near,
            failures=tuple(judged.failures) if judged is not None else (),
            action=int(action),
        )

    def _draw(self, lane: Lane, purpose: str) -> random.Random:
        """A draw that depends on the chunk alone, so that a resumed run makes the same."""
        return random.Random(f"{self._config.seed}/{lane.episode.name}/{lane.position}/{purpose}")


@dataclass(frozen=True, slots=True)
class _Judged:
    states: list[AdapterState]
    own: list[float]
    failures: list[str | None]


class _After:
    def __init__(self) -> None:
        self.losses: dict[str, list[float]] = {"next": [], "later": []}
        self.tokens: dict[str, int] = {"next": 0, "later": 0}
