"""Full-information traces state what really happens, and collecting them can be resumed."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from ponderttt.adaptation.actions import Action
from ponderttt.engine.core import EngineCore
from ponderttt.errors import InvalidRequestError
from tests.ponderttt.engine import harness
from tests.training.rollouts.episodes_of import CHUNK, episode
from training.rollouts.collect import CollectConfig, collect
from training.rollouts.episodes import Episode
from training.rollouts.lanes import Lane, Lanes
from training.rollouts.traces import TraceHeader, TraceRecord, TraceWriter, read_traces

CONFIG = CollectConfig(
    lanes=2, peek_tokens=20, later_places=1, behaviour=(0.3, 0.3, 0.2, 0.2), seed=3
)
HEADER = TraceHeader("tiny", CHUNK, 20, CONFIG.behaviour, CONFIG.seed)


class StoppedError(Exception):
    """Somebody pulled the plug."""


@pytest.fixture
def core(tiny_llama_dir: Path) -> EngineCore:
    return harness.make_core(tiny_llama_dir)


@pytest.fixture
def told(tiny_llama_dir: Path) -> list[Episode]:
    return [episode(tiny_llama_dir, n, (96, 70, 40)) for n in range(3)]


def run(
    core: EngineCore,
    told: list[Episode],
    path: Path,
    config: CollectConfig = CONFIG,
    stop_after: int | None = None,
) -> list[TraceRecord]:
    """Collect, up to some number of records; what the file holds then."""
    count = 0

    def advance(chunks: int) -> None:
        nonlocal count
        count += chunks
        if stop_after is not None and count >= stop_after:
            raise StoppedError

    with TraceWriter(path, HEADER) as writer:
        try:
            collect(core, told, config, writer, advance)
        except StoppedError:
            assert core.bank.occupied == 0
    return read_traces(path)[1]


def by_place(records: list[TraceRecord]) -> dict[tuple[str, int], TraceRecord]:
    return {(record.episode, record.index): record for record in records}


def assert_close(found: TraceRecord, wanted: TraceRecord, tolerance: float) -> None:
    for name, value in asdict(wanted).items():
        theirs = getattr(found, name)
        if name in ("loss", "features", "own", "next", "later"):
            assert theirs == pytest.approx(value, abs=tolerance, rel=tolerance), name
        else:
            assert theirs == value, name


def test_every_chunk_of_every_episode_has_one_record(
    core: EngineCore, told: list[Episode], tmp_path: Path
) -> None:
    records = run(core, told, tmp_path / "t.jsonl")
    wanted = {(e.name, index) for e in told for index in range(len(e.chunks))}
    assert len(records) == len(wanted)
    assert set(by_place(records)) == wanted
    assert {record.action for record in records} == set(Action)
    assert core.bank.occupied == 0, "all slots are given back"


def test_recorded_outcome_is_that_of_a_lane_that_really_does_it(
    core: EngineCore, told: list[Episode], tmp_path: Path
) -> None:
    records = by_place(run(core, told[:1], tmp_path / "t.jsonl"))
    only = told[0]
    for action in Action:
        lanes = Lanes(core)
        lane = lanes.open(only)
        for index in range(4):
            _read_and_learn(lanes, lane, Action(records[only.name, index].action))
        # Chunk 4 is learned in another way than it was; the chunk after it tells what that did.
        record = records[only.name, 4]
        lanes.read([lane])
        assert lane.scores is not None
        assert lane.scores.loss == pytest.approx(record.loss, abs=2e-5)
        if action is not Action.SKIP:
            (outcome,) = lanes.write([lane], [action])
            assert outcome.failure == record.failures[action]
            if outcome.failure is None:
                assert outcome.losses[-1] == pytest.approx(record.own[action], abs=2e-5)
        lanes.record(lane, action, budgeted=False)
        lanes.read([lane])
        seen = float(lane.scores.losses[1 : 1 + record.next_tokens].sum())
        assert seen == pytest.approx(record.next[action], abs=2e-3)
        lanes.close(lane)


def _read_and_learn(lanes: Lanes, lane: Lane, action: Action) -> None:
    lanes.read([lane])
    if action is not Action.SKIP and lanes.learns(lane):
        lanes.write([lane], [action])
    lanes.record(lane, action, budgeted=False)


def test_update_that_would_be_rolled_back_is_recorded_as_skip(
    tiny_llama_dir: Path, told: list[Episode], tmp_path: Path
) -> None:
    # Steps so long that the chunk's loss rises, or the weights end up too far away.
    rule = replace(harness.RULE, learning_rate=0.3)
    core = harness.make_core(tiny_llama_dir, rule=rule)
    records = run(core, told, tmp_path / "t.jsonl")
    found = set()
    for record in records:
        assert not record.failures or record.failures[Action.SKIP] is None
        for action, failure in zip(Action, record.failures, strict=False):
            if failure is None:
                continue
            found.add(failure)
            assert record.own[action] == record.own[Action.SKIP]
            for losses in (record.next, record.later):
                if losses:
                    assert losses[action] == pytest.approx(losses[Action.SKIP], abs=1e-3)
    assert found == {"norm", "loss"}


def test_chunk_met_again_is_recorded_as_one_that_cannot_be_learned(
    core: EngineCore, told: list[Episode], tmp_path: Path
) -> None:
    first, second, _ = told[0].documents
    twice = replace(told[0], documents=(first, second, first))
    config = replace(CONFIG, behaviour=(0.0, 1.0, 0.0, 0.0))
    path = tmp_path / "t.jsonl"
    with TraceWriter(path, HEADER) as writer:
        collect(core, [twice], config, writer)
    records = read_traces(path)[1]
    kept = [r.learnable and r.failures[Action.UPDATE_1] is None for r in records]
    assert any(kept[:3])
    # The third document is the first once more; what was rolled back may be tried again.
    assert [not r.learnable for r in records[6:]] == kept[:3]


@pytest.mark.parametrize("stop_after", [1, 5, 13])
def test_interrupted_collection_ends_up_with_the_same_records(
    core: EngineCore, told: list[Episode], tmp_path: Path, stop_after: int
) -> None:
    whole = by_place(run(core, told, tmp_path / "whole.jsonl"))
    path = tmp_path / "parts.jsonl"
    some = run(core, told, path, stop_after=stop_after)
    assert stop_after <= len(some) < len(whole)
    # The machine went down while a line was being written.
    path.write_bytes(path.read_bytes()[:-20])
    parts = by_place(run(core, told, path))
    assert parts.keys() == whole.keys()
    for place, record in whole.items():
        assert_close(parts[place], record, 2e-3)


def test_lanes_side_by_side_record_what_one_lane_does(
    core: EngineCore, told: list[Episode], tmp_path: Path
) -> None:
    together = by_place(run(core, told, tmp_path / "a.jsonl", replace(CONFIG, lanes=3)))
    alone = by_place(run(core, told, tmp_path / "b.jsonl", replace(CONFIG, lanes=1)))
    assert together.keys() == alone.keys()
    for place, record in alone.items():
        assert_close(together[place], record, 2e-3)


def test_short_chunks_are_not_learned_and_later_documents_are_looked_at(
    core: EngineCore, told: list[Episode], tmp_path: Path
) -> None:
    records = by_place(run(core, told[:1], tmp_path / "t.jsonl"))
    # The documents' chunks: 32 32 32 | 32 32 6 | 32 8.
    short = records[told[0].name, 5]
    assert (short.tokens, short.own, short.next, short.action) == (6, (), (), Action.SKIP)
    first = records[told[0].name, 0]
    assert (first.next_tokens, first.later_tokens) == (20, 20)
    assert (first.near, first.far) == (2, 5)
    last = records[told[0].name, 7]
    assert (last.next_tokens, last.later_tokens, last.near, last.far) == (0, 0, 0, 0)


def test_next_chunk_does_not_count_as_a_later_document(
    core: EngineCore, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    two = episode(tiny_llama_dir, 0, (64, 64))
    config = replace(CONFIG, later_places=2)
    records = by_place(run(core, [two], tmp_path / "t.jsonl", config))
    looked = [records[two.name, index] for index in range(4)]
    assert [(r.next_tokens, r.later_tokens) for r in looked] == [(20, 20), (20, 0), (20, 0), (0, 0)]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"lanes": 0}, "lanes"),
        ({"peek_tokens": 0}, "peek_tokens"),
        ({"later_places": -1}, "later_places"),
        ({"behaviour": (0.5, 0.5, 0.5, -0.5)}, "behaviour"),
        ({"behaviour": (0.5, 0.4, 0.0, 0.0)}, "behaviour"),
        ({"behaviour": (0.5, 0.5)}, "behaviour"),
        ({"behaviour": (float("nan"), 0.5, 0.25, 0.25)}, "behaviour"),
    ],
)
def test_bad_setting_is_named(values: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        CollectConfig(**values)  # type: ignore[arg-type]
    assert caught.value.param == field


def test_weights_that_are_collected_on_are_those_of_the_recorded_actions(
    core: EngineCore, told: list[Episode], tmp_path: Path
) -> None:
    records = by_place(run(core, told[:1], tmp_path / "t.jsonl"))
    lanes = Lanes(core)
    lane = lanes.open(told[0])
    for index in range(len(told[0].chunks)):
        record = records[told[0].name, index]
        lanes.read([lane])
        features = lanes.features(lane, lane.session.history(None, 0.0, lane.ahead))
        torch.testing.assert_close(features, torch.tensor(record.features), atol=2e-3, rtol=2e-3)
        if record.action != Action.SKIP:
            lanes.write([lane], [Action(record.action)])
        lanes.record(lane, Action(record.action), budgeted=False)
