"""Lanes do what the engine does with an adapt request of the same documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.gates import Decision
from ponderttt.adaptation.params import TTTParams
from ponderttt.adaptation.policy import PolicyGate
from ponderttt.engine.core import EngineCore
from ponderttt.errors import InvalidRequestError
from ponderttt.models.attention import FlatBatch
from ponderttt.models.decoder import Decoder
from tests.ponderttt.engine import harness
from tests.training.rollouts.episodes_of import CHUNK, episode
from training.rollouts import lanes as lanes_module
from training.rollouts.lanes import Lane, Lanes, TrunkCache, run_trunk
from training.rollouts.snapshots import restore, snapshot

PATTERN = (
    Action.UPDATE_1, Action.SKIP, Action.UPDATE_4, Action.UPDATE_2, Action.SKIP, Action.UPDATE_1,
    Action.UPDATE_2, Action.SKIP,
)  # fmt: skip
BUDGET = 5.0


class Scripted(PolicyGate):
    """Takes actions from a list, and keeps the features that it was shown."""

    def __init__(self, actions: tuple[Action, ...]) -> None:
        self.actions: Iterator[Action] = iter(actions)
        self.seen: list[Tensor] = []

    def choose(self, decision: Decision) -> Action:
        self.seen.append(decision.features())
        return next(self.actions)


@pytest.fixture
def core(tiny_llama_dir: Path) -> EngineCore:
    return harness.make_core(tiny_llama_dir)


def play(lanes: Lanes, lane: Lane, actions: list[Action]) -> tuple[list[float], list[Tensor]]:
    """Losses and features of every chunk."""
    losses, features = [], []
    for action in actions:
        lanes.read([lane])
        assert lane.scores is not None
        losses.append(lane.scores.loss)
        session = lane.session
        credit = session.ledger.credit(lanes.core.costs["nominal"], BUDGET)
        features.append(lanes.features(lane, session.history(BUDGET, credit, lane.ahead)))
        if action is not Action.SKIP:
            lanes.write([lane], [action])
        lanes.record(lane, action)
    return losses, features


def weights_of(core: EngineCore, lane: Lane) -> Tensor:
    return core.bank.state(lane.session.slot, lane.session.owner).weights


@pytest.mark.parametrize("model", ["llama", "qwen2", "mistral", "gpt2"])
def test_lane_equals_the_engine_chunk_by_chunk(model: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(f"tiny_{model}_dir")
    told = episode(directory, 0)
    gate = Scripted(PATTERN)
    engine = harness.make_core(directory, policy=gate)
    engine.sessions.create("s", TTTParams())
    ttt = TTTParams(session="s", gate="policy", budget=BUDGET, chunk_size=CHUNK)
    chunks = harness.adapt(engine, *told.documents, ttt=ttt).chunks
    assert {c.action for c in chunks} == set(Action), "the script must reach every action"

    core = harness.make_core(directory)
    lanes = Lanes(core)
    lane = lanes.open(told)
    # What the engine rolled back is tried again here, and rolled back as well.
    losses, features = play(lanes, lane, [chunk.action for chunk in chunks])

    assert losses == pytest.approx([chunk.loss_before for chunk in chunks], abs=2e-5)
    long_enough = [f for f, c in zip(features, chunks, strict=True) if c.reason != "short"]
    torch.testing.assert_close(
        torch.stack(long_enough), torch.stack(gate.seen), atol=2e-4, rtol=2e-3
    )
    session = engine.sessions.get("s")
    theirs = engine.sessions.state(session)
    torch.testing.assert_close(weights_of(core, lane), theirs.weights, atol=2e-5, rtol=1e-4)
    assert lane.session.version == session.version
    assert lane.session.ledger.totals["nominal"] == session.ledger.totals["nominal"]
    assert lane.session.ledger.chunks_by_action == session.ledger.chunks_by_action


def test_a_document_is_read_as_a_prompt_to_its_last_row(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that row is left alone by what is read at once."""
    monkeypatch.setattr(lanes_module, "_TRUNK_ROWS", 16)
    read, batches = Decoder.batch, []

    def noted(self: Decoder, *given: Any, **options: Any) -> FlatBatch:
        batches.append(read(self, *given, **options))
        return batches[-1]

    monkeypatch.setattr(Decoder, "batch", noted)
    run_trunk(core.model, core.bank.layout.first_layer, range(33))
    assert [(batch.lengths, batch.decodes) for batch in batches] == [
        ([16], False), ([16], False), ([1], False),
    ]  # fmt: skip


def test_update_that_the_engine_rolls_back_is_rolled_back(tiny_llama_dir: Path) -> None:
    told = episode(tiny_llama_dir, 0)
    # The weights may not go far: the later updates are refused.
    rule = replace(harness.RULE, max_norm=1.5)
    engine = harness.make_core(tiny_llama_dir, rule=rule)
    engine.sessions.create("s", TTTParams())
    ttt = TTTParams(session="s", gate="fixed", action=Action.UPDATE_2, chunk_size=CHUNK)
    chunks = harness.adapt(engine, *told.documents, ttt=ttt).chunks
    refused = [chunk.rollback for chunk in chunks]
    assert len(set(refused)) > 1, "some must stay and some go"

    core = harness.make_core(tiny_llama_dir, rule=rule)
    lanes = Lanes(core)
    lane = lanes.open(told)
    failures: list[str | None] = []
    while not lane.done:
        lanes.read([lane])
        if lanes.learns(lane):
            failures += [outcome.failure for outcome in lanes.write([lane], [Action.UPDATE_2])]
        else:
            failures.append(None)
    session = engine.sessions.get("s")
    assert failures == refused
    assert lane.session.rollbacks == session.rollbacks > 0
    assert lane.session.version == session.version
    theirs = engine.sessions.state(session)
    torch.testing.assert_close(weights_of(core, lane), theirs.weights, atol=2e-5, rtol=1e-4)


def test_chunk_met_again_is_left_out_as_the_engine_leaves_it_out(
    core: EngineCore, tiny_llama_dir: Path
) -> None:
    first = episode(tiny_llama_dir, 0, (96, 40))
    # A copy of the first document, and of the second with another end.
    documents = (*first.documents, first.documents[0], first.documents[1][:38])
    told = replace(first, documents=documents, paths=("a", "b", "c", "d"))
    engine = harness.make_core(tiny_llama_dir)
    engine.sessions.create("s", TTTParams())
    ttt = TTTParams(session="s", gate="fixed", action=Action.UPDATE_1, chunk_size=CHUNK)
    chunks = harness.adapt(engine, *documents, ttt=ttt).chunks

    lanes = Lanes(core)
    lane = lanes.open(told)
    learned = []
    while not lane.done:
        lanes.read([lane])
        learned.append(lanes.learns(lane))
        if learned[-1]:
            lanes.write([lane], [Action.UPDATE_1])
        lanes.record(lane, Action.UPDATE_1 if learned[-1] else Action.SKIP)

    assert learned == [chunk.reason not in ("seen", "short") for chunk in chunks]
    assert [c.reason for c in chunks[5:]] == ["seen"] * 4 + ["short"]
    session = engine.sessions.get("s")
    assert list(lane.session.learned) == list(session.learned)
    assert lane.session.learned_tokens == session.learned_tokens
    assert lane.session.ledger.chunks_by_action == session.ledger.chunks_by_action
    theirs = engine.sessions.state(session)
    torch.testing.assert_close(weights_of(core, lane), theirs.weights, atol=2e-5, rtol=1e-4)


def test_lanes_together_equal_each_alone(core: EngineCore, tiny_llama_dir: Path) -> None:
    told = [episode(tiny_llama_dir, n, lengths) for n, lengths in enumerate([(96, 70), (64, 101)])]
    scripts = [PATTERN[:6], PATTERN[2:8]]
    alone = []
    for each, script in zip(told, scripts, strict=True):
        lanes = Lanes(core)
        lane = lanes.open(each)
        losses, _ = play(lanes, lane, list(script))
        alone.append((losses, weights_of(core, lane)))
        lanes.close(lane)

    lanes = Lanes(core)
    both = [lanes.open(each) for each in told]
    found: list[list[float]] = [[], []]
    for step in range(6):
        lanes.read(both)
        for lane, losses in zip(both, found, strict=True):
            assert lane.scores is not None
            losses.append(lane.scores.loss)
        steps = [(lane, script[step]) for lane, script in zip(both, scripts, strict=True)]
        learning = [pair for pair in steps if pair[1] is not Action.SKIP]
        lanes.write([lane for lane, _ in learning], [action for _, action in learning])
        for lane, script in zip(both, scripts, strict=True):
            lanes.record(lane, script[step])

    for lane, losses, (expected, weights) in zip(both, found, alone, strict=True):
        assert losses == pytest.approx(expected, abs=2e-5)
        torch.testing.assert_close(weights_of(core, lane), weights, atol=2e-5, rtol=1e-4)


def test_peek_equals_the_next_read_and_changes_nothing(
    core: EngineCore, tiny_llama_dir: Path
) -> None:
    lanes = Lanes(core)
    lane = lanes.open(episode(tiny_llama_dir, 0))
    for _ in range(2):
        lanes.read([lane])
        lanes.write([lane], [Action.UPDATE_1])
        lanes.record(lane, Action.UPDATE_1)
    assert lane.document is not None
    assert lane.document.final is not None
    before = (
        lane.document.cache.keys[:, :, :64].clone(),
        lane.document.final[:64].clone(),
        weights_of(core, lane),
        lane.document.computed,
        lane.position,
    )
    weights = weights_of(core, lane)
    other = weights + 0.01
    # The next chunk and the beginning of a later document, under two sets of weights at once.
    peeked = lanes.peek(
        [(lane, 2, weights), (lane, 2, other), (lane, 3, weights), (lane, 2, weights)], tokens=20
    )
    assert peeked[0] == pytest.approx(peeked[3], abs=1e-5)
    assert abs(peeked[0] - peeked[1]) > 1e-3
    torch.testing.assert_close(lane.document.cache.keys[:, :, :64], before[0], rtol=0, atol=0)
    torch.testing.assert_close(lane.document.final[:64], before[1], rtol=0, atol=0)
    torch.testing.assert_close(weights_of(core, lane), before[2], rtol=0, atol=0)
    assert (lane.document.computed, lane.position) == before[3:]

    lanes.read([lane])
    assert lane.scores is not None
    # The first token of the chunk is predicted by what was read before: not peeked at.
    assert float(lane.scores.losses[1:21].sum()) == pytest.approx(peeked[0], abs=1e-3)
    lanes.read([lane])
    assert float(lane.scores.losses[:20].sum()) == pytest.approx(peeked[2], abs=1e-3)


def test_peek_refuses_a_chunk_in_the_middle_of_a_later_document(
    core: EngineCore, tiny_llama_dir: Path
) -> None:
    lanes = Lanes(core)
    lane = lanes.open(episode(tiny_llama_dir, 0))
    lanes.read([lane])
    with pytest.raises(RuntimeError, match="peeked"):
        lanes.peek([(lane, 4, weights_of(core, lane))], tokens=8)


def test_kept_states_are_those_of_the_shorter_actions(
    core: EngineCore, tiny_llama_dir: Path
) -> None:
    found = {}
    for action in (Action.UPDATE_1, Action.UPDATE_2, Action.UPDATE_4):
        lanes = Lanes(core)
        lane = lanes.open(episode(tiny_llama_dir, 0))
        lanes.read([lane])
        (outcome,) = lanes.write([lane], [action], keep_states=True)
        assert lane.session.version == 0, "nothing is committed"
        found[action] = outcome
        lanes.close(lane)
    states = found[Action.UPDATE_4].states
    assert len(states) == 4
    assert torch.equal(states[0].weights, found[Action.UPDATE_1].states[0].weights)
    assert torch.equal(states[1].weights, found[Action.UPDATE_2].states[1].weights)


def test_ahead_counts_what_follows_and_near_what_follows_in_the_document(
    core: EngineCore, tiny_llama_dir: Path
) -> None:
    lanes = Lanes(core)
    lane = lanes.open(episode(tiny_llama_dir, 0))
    counts = []
    while not lane.done:
        lanes.read([lane])
        counts.append((lane.ahead, lane.near))
    # Documents of 96, 70 and 64 tokens: 3, 3 and 2 chunks.
    assert counts == [(7, 2), (6, 1), (5, 0), (4, 2), (3, 1), (2, 0), (1, 1), (0, 0)]


def test_opening_more_lanes_than_slots_is_refused_and_leaves_no_session(
    tiny_llama_dir: Path,
) -> None:
    core = harness.make_core(tiny_llama_dir, adapter_slots=1)
    lanes = Lanes(core)
    first = lanes.open(episode(tiny_llama_dir, 0))
    with pytest.raises(RuntimeError, match="slots"):
        lanes.open(episode(tiny_llama_dir, 1))
    assert len(core.sessions) == 1
    lanes.close(first)
    lanes.open(episode(tiny_llama_dir, 1))


def test_document_longer_than_the_model_reads_at_once_is_refused(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir, max_model_len=80)
    lanes = Lanes(core)
    with pytest.raises(InvalidRequestError, match="96 tokens; the model reads 80") as caught:
        lanes.open(episode(tiny_llama_dir, 0))
    assert caught.value.param == "document_tokens"
    assert (core.bank.occupied, len(core.sessions)) == (0, 0)
    lanes.open(episode(tiny_llama_dir, 0, (80, 70)))


def test_trunk_is_kept_up_to_a_limit_and_computed_again_the_same(
    core: EngineCore, tiny_llama_dir: Path
) -> None:
    first, second = episode(tiny_llama_dir, 0, (96, 70)).documents
    kept = TrunkCache(limit=100 * core.model.config.hidden_size * 4)
    boundary = kept.get(core, first)
    assert kept.get(core, first) is boundary
    kept.get(core, second)
    assert list(kept.kept) == [second], "both are more than the limit"
    assert kept.size == kept.kept[second].nbytes
    assert torch.equal(kept.get(core, first), boundary)
    # Computed at once or in parts.
    torch.testing.assert_close(
        run_trunk(core.model, core.bank.layout.first_layer, first[:50]), boundary[:50],
        atol=1e-5, rtol=1e-5,
    )  # fmt: skip


def test_restored_lane_goes_on_bitwise(core: EngineCore, tiny_llama_dir: Path) -> None:
    told = episode(tiny_llama_dir, 0)
    lanes = Lanes(core)
    lane = lanes.open(told)
    play(lanes, lane, list(PATTERN[:4]))
    kept = snapshot(core, lane)
    expected, _ = play(lanes, lane, list(PATTERN[4:8]))
    weights = weights_of(core, lane)
    lanes.close(lane)

    again = Lanes(core)
    twin = again.open(told)
    restore(core, again, twin, kept)
    found, _ = play(again, twin, list(PATTERN[4:8]))
    assert found == expected
    assert torch.equal(weights_of(core, twin), weights)
    assert list(twin.session.learned) == list(lane.session.learned)


def test_snapshot_needs_a_chunk(core: EngineCore, tiny_llama_dir: Path) -> None:
    lane = Lanes(core).open(episode(tiny_llama_dir, 0))
    with pytest.raises(RuntimeError, match="read a chunk"):
        snapshot(core, lane)
