"""Methods played on the engine itself: sessions that really learn, one per method and episode.

All methods read an episode side by side, so the trunk runs once for all of them. A file keeps what
came out, episode by episode; an interrupted run goes on with the next episode.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.gates import Decision, within_budget
from ponderttt.adaptation.params import check_budget
from ponderttt.adaptation.policy import PolicyGate
from ponderttt.engine.core import EngineCore
from ponderttt.errors import InvalidRequestError
from training.analysis.playing import Chooser, Turn
from training.analysis.schedules import Served
from training.environments.budgeted import BudgetRules
from training.live_results import LiveResult, append_results, open_results
from training.rollouts.episodes import Episode
from training.rollouts.lanes import Lane, Lanes, TrunkCache


@dataclass(frozen=True, slots=True)
class Method:
    """Who decides, and under which budget.

    Args:
        name: of the method.
        chooser: decides.
        budget: highest mean cost, × forward; None: no limit.
    """

    name: str
    chooser: Chooser
    budget: float | None


def play_live(
    core: EngineCore,
    episodes: Sequence[Episode],
    methods: Sequence[Method],
    rules: BudgetRules,
    output: Path | None,
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda chunks: None,
    trunks: TrunkCache | None = None,
) -> list[LiveResult]:
    """Play every method on every episode.

    Args:
        core: its bank has a slot for every method.
        episodes: to read.
        methods: with different pairs of name and budget.
        rules: cost models.
        output: JSON lines; what is there already is not played again, unless text, model, shape,
            rule, policy, costs or seed were others. None: nothing is kept.
        seed: of the draws.
        progress: called with the number of chunks that were read since the last call.
        trunks: as for `Lanes`.
    Returns:
        The results of these methods and episodes, old and new: by episode, then by method.
    Raises:
        InvalidRequestError: too small a bank, a budget out of range, two methods with the same name
            and budget, or the output cannot be written.
        LiveFormatError: the output is damaged.
    """
    _check(core, methods)
    done: dict[tuple[object, ...], LiveResult] = {}
    if output is not None:
        done = {(r.episode, r.method, r.budget, r.made_with): r for r in open_results(output)}
    lanes = Lanes(core, trunks)
    every: list[LiveResult] = []
    for episode in episodes:
        keys = [
            (episode.name, m.name, m.budget, _made_with(core, episode, m, rules, seed))
            for m in methods
        ]
        left = [(m, key[3]) for m, key in zip(methods, keys, strict=True) if key not in done]
        progress(len(episode.chunks) * (len(methods) - len(left)))
        results = _play(lanes, episode, left, rules, seed, progress)
        done |= {(r.episode, r.method, r.budget, r.made_with): r for r in results}
        if output is not None:
            append_results(output, results)
        every += [done[key] for key in keys]
    return every


def _check(core: EngineCore, methods: Sequence[Method]) -> None:
    if len(methods) > core.bank.capacity:
        raise InvalidRequestError(
            "slots", f"{core.bank.capacity} for {len(methods)} methods; give one to each"
        )
    if len({(method.name, method.budget) for method in methods}) < len(methods):
        raise InvalidRequestError("methods", "two have the same name and budget; leave one out")
    for method in methods:
        check_budget("budget", method.budget)


def _made_with(
    core: EngineCore, episode: Episode, method: Method, rules: BudgetRules, seed: int
) -> str:
    costs = rules.costs[rules.cost_model]
    return _digest(
        core.model_name,
        asdict(core.bank.layout.config),
        asdict(core.writer.rule),
        [episode.chunk_size, episode.documents],
        fingerprint(method.chooser),
        # Without a budget they decide nothing.
        None if method.budget is None else [costs.name, [costs[action] for action in Action]],
        seed,
    )


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def fingerprint(chooser: Chooser) -> str:
    """The same for choosers that choose alike; no other chooser has it."""
    gate = chooser.gate if isinstance(chooser, Served) else None
    if not isinstance(gate, PolicyGate):
        # Dataclasses throughout, whose texts tell all that they are made of.
        return repr(chooser)
    found = hashlib.sha256(repr((gate.metadata.feature_mean, gate.metadata.feature_std)).encode())
    for name, tensor in sorted(gate.network.state_dict().items()):
        found.update(f"{name} {list(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
    return found.hexdigest()


class _Player:
    """One method's session."""

    def __init__(
        self, lane: Lane, method: Method, rules: BudgetRules, seed: int, made_with: str
    ) -> None:
        self.lane = lane
        self.method = method
        self.decided = 0
        self.nats: list[float] = []
        self.tokens: list[int] = []
        self.actions: list[Action] = []
        self._rules = rules
        self._seed = seed
        self._made_with = made_with
        self._rng = np.random.default_rng([seed, crc32(lane.episode.name.encode())])

    def decide(self, lanes: Lanes) -> Action:
        """About the chunk read last."""
        scores = self.lane.scores
        if scores is None:
            raise RuntimeError("a lane has scores once it has read a chunk")
        self.nats.append(float(scores.losses.sum()))
        self.tokens.append(int(scores.losses.numel()))
        action = Action.SKIP
        if lanes.learns(self.lane):
            turn = self._turn(lanes, float(scores.loss))
            action = within_budget(self.method.chooser.choose(turn), turn.decision.allowed)
            self.decided += 1
        self.actions.append(action)
        return action

    def _turn(self, lanes: Lanes, loss: float) -> Turn:
        lane, budget, costs = self.lane, self.method.budget, self._rules.costs
        session, model = lane.session, costs[self._rules.cost_model]
        credit = session.ledger.credit(model, budget)
        decision = Decision(
            loss=loss,
            features=lambda: lanes.features(lane, session.history(budget, credit, lane.ahead)),
            allowed=session.ledger.allowed(model, budget, lane.ahead),
            budget=budget,
            costs=model,
            threshold=session.threshold,
            draw_key=f"{self._seed}/{lane.episode.name}/{lane.position - 1}",
        )
        return Turn(
            decision, budget or 0.0, credit, lane.position - 1, self.decided, lane.ahead, self._rng
        )

    def result(self) -> LiveResult:
        """Once all is read."""
        lane = self.lane
        return LiveResult(
            lane.episode.name,
            lane.episode.repository,
            self.method.name,
            self.method.budget,
            tuple(self.nats),
            tuple(self.tokens),
            tuple(int(action) for action in self.actions),
            lane.session.rollbacks,
            self._made_with,
        )


def _play(
    lanes: Lanes,
    episode: Episode,
    methods: Sequence[tuple[Method, str]],
    rules: BudgetRules,
    seed: int,
    progress: Callable[[int], None],
) -> list[LiveResult]:
    players: list[_Player] = []
    try:
        for method, made_with in methods:
            players.append(_Player(lanes.open(episode), method, rules, seed, made_with))
        for _ in episode.chunks if players else ():
            lanes.read([player.lane for player in players])
            with torch.no_grad():
                actions = [player.decide(lanes) for player in players]
            learning = [
                (player.lane, action)
                for player, action in zip(players, actions, strict=True)
                if action is not Action.SKIP
            ]
            if learning:
                lanes.write([lane for lane, _ in learning], [action for _, action in learning])
            for player, action in zip(players, actions, strict=True):
                lanes.record(player.lane, action, budgeted=player.method.budget is not None)
            progress(len(players))
        return [player.result() for player in players]
    finally:
        for player in players:
            lanes.close(player.lane)
