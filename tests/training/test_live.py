"""Methods played on the engine itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.gates import OffGate, RandomGate, ThresholdGate
from ponderttt.adaptation.ledger import WINDOW
from ponderttt.adaptation.policy import PolicyGate, PolicyMetadata, PolicyNetwork
from ponderttt.engine.core import EngineCore
from ponderttt.errors import InvalidRequestError
from training.analysis.playing import Chooser, worst_window
from training.analysis.schedules import Fixed, FrontLoaded, PerBudget, Periodic, Random, Served
from training.environments.budgeted import BudgetRules
from training.learning import rules_of
from training.live import Method, fingerprint, play_live
from training.live_results import (
    LiveFormatError,
    LiveResult,
    by_repository,
    mean_costs,
    read_results,
)
from training.recipe import Recipe, episodes_by_split, load_split
from training.rollouts.episodes import Episode
from training.rollouts.lanes import Lanes
from training.tracing import open_core

OFF = Method("off", Served(OffGate()), None)
UPDATE_1 = Method("UPDATE_1", Fixed(Action.UPDATE_1), None)


def gate(seed: int) -> PolicyGate:
    """Random weights, large enough for actions that differ from chunk to chunk."""
    torch.manual_seed(seed)
    network = PolicyNetwork((8,))
    with torch.no_grad():
        network.actor.weight.mul_(10.0)
    metadata = PolicyMetadata("m", 32, "nominal", (2.0,), (0.0,) * 32, (1.0,) * 32, (8,))
    return PolicyGate(network, metadata)


METHODS = (
    OFF,
    UPDATE_1,
    Method("policy", Served(gate(0)), 3.0),
    Method("threshold", Served(ThresholdGate()), 2.0),
    Method("random", Random(), 2.0),
    Method("random gate", Served(RandomGate()), 2.0),
)


@pytest.fixture(scope="module")
def episodes(tiny_recipe: Recipe, tiny_core: EngineCore) -> list[Episode]:
    divided = load_split(tiny_recipe.corpora, progress=False)
    return episodes_by_split(divided, tiny_core.tokenizer, tiny_recipe.episodes)["test"]


@pytest.fixture(scope="module")
def rules(tiny_recipe: Recipe, tiny_core: EngineCore) -> BudgetRules:
    return rules_of(tiny_recipe, tiny_core.costs)


def read_alone(core: EngineCore, episode: Episode, action: Action) -> list[float]:
    """Losses of an episode's chunks, by the lanes alone."""
    lanes = Lanes(core)
    lane = lanes.open(episode)
    losses = []
    while not lane.done:
        lanes.read([lane])
        assert lane.scores is not None
        losses.append(float(lane.scores.losses.sum()))
        if action is not Action.SKIP and lanes.learns(lane):
            lanes.write([lane], [action])
    lanes.close(lane)
    return losses


def test_methods_together_do_as_each_does_alone(
    tiny_core: EngineCore, episodes: Sequence[Episode], rules: BudgetRules
) -> None:
    together = play_live(tiny_core, episodes, METHODS, rules, None, seed=4)
    assert [(r.episode, r.method) for r in together] == [
        (e.name, m.name) for e in episodes for m in METHODS
    ]
    for index, method in enumerate(METHODS):
        alone = play_live(tiny_core, episodes, [method], rules, None, seed=4)
        for one, other in zip(together[index :: len(METHODS)], alone, strict=True):
            assert one.actions == other.actions
            assert one.tokens == other.tokens
            np.testing.assert_allclose(one.nats, other.nats, rtol=1e-4)
    # Else the test would show nothing.
    assert len({each.actions for each in together}) > 3
    # All sessions have been given back.
    assert tiny_core.bank.occupied == 0


@pytest.mark.parametrize(("method", "action"), [(OFF, Action.SKIP), (UPDATE_1, Action.UPDATE_1)])
def test_losses_are_those_of_the_lanes(
    tiny_core: EngineCore,
    episodes: Sequence[Episode],
    rules: BudgetRules,
    method: Method,
    action: Action,
) -> None:
    for episode, result in zip(
        episodes, play_live(tiny_core, episodes, [method], rules, None), strict=True
    ):
        np.testing.assert_allclose(result.nats, read_alone(tiny_core, episode, action), rtol=1e-5)
        long = [end - start >= 32 for _, start, end in episode.chunks]
        assert result.actions == tuple(int(action) if each else 0 for each in long)
        # The first token of a document is predicted by nothing.
        assert sum(result.tokens) == episode.tokens - len(episode.documents)


def test_learning_changes_what_follows_and_not_what_came_before(
    tiny_core: EngineCore, episodes: Sequence[Episode], rules: BudgetRules
) -> None:
    off, learned = play_live(tiny_core, episodes[:1], [OFF, UPDATE_1], rules, None)
    assert off.nats[0] == pytest.approx(learned.nats[0], rel=1e-5)
    assert abs(off.nats[1] - learned.nats[1]) > 1e-3
    assert off.rollbacks == 0
    assert mean_costs(off, rules.costs) == {"nominal": 1.0, "measured": 1.0}
    longs = sum(each == Action.UPDATE_1 for each in learned.actions)
    expected = 1 + 2 * longs / len(learned.actions)
    assert mean_costs(learned, rules.costs)["nominal"] == pytest.approx(expected)
    both = by_repository([off, replace(off, episode="other", nats=(0.0,) * 6)])
    assert both == {off.repository: pytest.approx(sum(off.nats) / sum(off.tokens) / 2)}


@pytest.mark.parametrize("model", ["nominal", "measured"])
def test_no_budget_is_ever_exceeded_in_the_mean_or_in_a_window(
    tiny_core: EngineCore, episodes: Sequence[Episode], rules: BudgetRules, model: str
) -> None:
    # Three times the window, out of many short documents, no two of them alike.
    documents = tuple(
        (number, *document[:31])
        for number in range(WINDOW * 3 // 2)
        for document in episodes[0].documents
    )
    long = replace(episodes[0], documents=documents, paths=("",) * len(documents))
    kept = replace(rules, cost_model=model)  # type: ignore[arg-type]
    greedy = [
        Method("UPDATE_4", Fixed(Action.UPDATE_4), 1.5),
        Method("early", FrontLoaded(Action.UPDATE_2), 1.5),
    ]
    assert len(long.chunks) > 2 * WINDOW
    for result in play_live(tiny_core, [long], greedy, kept, None):
        costs = [kept.cost(Action(action)) for action in result.actions]
        assert np.mean(costs) <= 1.5 + 1e-9
        assert np.mean(costs) > 1.4
        assert worst_window(costs) <= 1.5 + 1e-9


def test_an_interrupted_run_ends_with_the_same_file(
    tiny_core: EngineCore, episodes: Sequence[Episode], rules: BudgetRules, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "live.jsonl"
    first = play_live(tiny_core, episodes, METHODS, rules, path)
    whole = path.read_bytes()
    counted: list[int] = []
    again = play_live(tiny_core, episodes, METHODS, rules, path, progress=counted.append)
    assert again == first
    assert path.read_bytes() == whole
    assert sum(counted) == len(METHODS) * sum(len(episode.chunks) for episode in episodes)
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(METHODS)]) + lines[len(METHODS)][:50])
    assert play_live(tiny_core, episodes, METHODS, rules, path) == first
    assert path.read_bytes() == whole


@pytest.mark.parametrize("what", ["policy", "seed", "budget", "rule", "text"])
def test_results_of_something_else_are_not_taken_over(
    tiny_recipe: Recipe, tiny_core: EngineCore, episodes: Sequence[Episode],
    rules: BudgetRules, tmp_path: Path, what: str,
) -> None:  # fmt: skip
    path = tmp_path / "live.jsonl"
    method, read = METHODS[2], episodes[:1]
    play_live(tiny_core, read, [method], rules, path)
    core, seed = tiny_core, 0
    if what == "policy":
        method = replace(method, chooser=Served(gate(1)))
    elif what == "seed":
        seed = 1
    elif what == "budget":
        method = replace(method, budget=1.5)
    elif what == "rule":
        core = open_core(tiny_recipe, rule=replace(tiny_core.writer.rule, learning_rate=0.01))
    else:
        documents = [document[:-1] for document in read[0].documents]
        read = [replace(read[0], documents=tuple(documents))]
    found = play_live(core, read, [method], rules, path, seed=seed)
    assert len(read_results(path)) == 2
    assert read_results(path)[1:] == found


def test_choosers_that_differ_have_different_fingerprints() -> None:
    choosers: list[Chooser] = [
        Fixed(Action.UPDATE_1), Fixed(Action.UPDATE_2), Periodic(Action.UPDATE_1, 2), Random(),
        Served(ThresholdGate()), Served(RandomGate()), Served(gate(0)), Served(gate(1)),
        PerBudget({2.0: Fixed(Action.UPDATE_1)}), PerBudget({3.0: Fixed(Action.UPDATE_1)}),
    ]  # fmt: skip
    assert len({fingerprint(chooser) for chooser in choosers}) == len(choosers)
    assert fingerprint(Served(gate(0))) == fingerprint(Served(gate(0)))


def test_too_few_slots_and_unusable_methods_are_refused(
    tiny_recipe: Recipe, episodes: Sequence[Episode], rules: BudgetRules
) -> None:
    core = open_core(tiny_recipe, slots=1)
    with pytest.raises(InvalidRequestError, match="slots: 1 for 2 methods"):
        play_live(core, episodes, [OFF, UPDATE_1], rules, None)
    with pytest.raises(InvalidRequestError, match=r"budget: 0\.5 lies outside"):
        play_live(core, episodes, [replace(OFF, budget=0.5)], rules, None)
    core = open_core(tiny_recipe, slots=2)
    with pytest.raises(InvalidRequestError, match="methods: two have the same name and budget"):
        play_live(core, episodes, [OFF, OFF], rules, None)


def test_a_damaged_file_and_one_that_cannot_be_written_are_refused(
    tiny_core: EngineCore, episodes: Sequence[Episode], rules: BudgetRules, tmp_path: Path
) -> None:
    path = tmp_path / "live.jsonl"
    for line in (b"3\n", b"{}\n", b"{\n", b"\xff\n"):
        path.write_bytes(line)
        with pytest.raises(LiveFormatError, match=r"live\.jsonl, line 1"):
            play_live(tiny_core, episodes, [OFF], rules, path)
        assert path.read_bytes() == line
    for wrong in (tmp_path, path / "below"):
        with pytest.raises(InvalidRequestError, match="output"):
            play_live(tiny_core, episodes, [OFF], rules, wrong)


def test_a_result_comes_back_from_its_file(
    tiny_core: EngineCore, episodes: Sequence[Episode], rules: BudgetRules, tmp_path: Path
) -> None:
    path = tmp_path / "live.jsonl"
    played = play_live(tiny_core, episodes[:1], [OFF, METHODS[3]], rules, path)
    assert read_results(path) == played
    assert all(isinstance(result, LiveResult) for result in played)
