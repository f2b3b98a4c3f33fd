"""Trace files: what is written comes back, and what was cut off is left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ponderttt.errors import InvalidRequestError
from training.analysis.gains import RewardConfig, inside_gains, trace_episodes
from training.rollouts.collect import BEHAVIOUR
from training.rollouts.traces import (
    TraceFormatError,
    TraceHeader,
    TraceRecord,
    TraceWriter,
    read_traces,
)

HEADER = TraceHeader("tiny", 32, 16, BEHAVIOUR, 0)


def record(index: int) -> TraceRecord:
    return TraceRecord(
        episode="a#0", index=index, tokens=32, loss=2.0, features=(0.5,) * 32,
        own=(2.0, 1.9, 1.8, 1.7), next=(32.0, 31.0, 30.0, 33.0), next_tokens=16,
        later=(16.0, 15.0, 14.0, 17.0), later_tokens=8, near=2, far=3,
        failures=(None, None, None, "loss"), action=1,
    )  # fmt: skip


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "t.jsonl"
    with TraceWriter(path, HEADER) as writer:
        writer.append([record(0), record(1)])
    assert read_traces(path) == (HEADER, [record(0), record(1)])


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_a_line_that_was_cut_off_is_left_out_and_written_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "t.jsonl"
    with TraceWriter(path, HEADER) as writer:
        writer.append([record(0), record(1)])
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_traces(path)[1] == [record(0)]
    with TraceWriter(path, HEADER) as writer:
        assert writer.records == [record(0)]
        writer.append([record(1)])
    assert read_traces(path)[1] == [record(0), record(1)]


def test_a_file_of_another_collection_is_refused_by_field(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    TraceWriter(path, HEADER).close()
    with pytest.raises(TraceFormatError, match="another seed"):
        TraceWriter(path, replace(HEADER, seed=1))


@pytest.mark.parametrize(
    ("near", "far", "later", "weights"),
    [
        # The next chunk stands for its document, later beginnings for later documents.
        (2, 3, True, (1 + 0.5, 0.25 + 0.125 + 0.0625)),
        # The document ends: the next chunk is one more sample of later documents.
        (0, 3, True, (1.75 * 16 / 24, 1.75 * 8 / 24)),
        # The last document, or none was looked at.
        (2, 0, False, (1.5, 0.0)),
        (1, 2, False, (1.75, 0.0)),
        (0, 2, False, (1.5, 0.0)),
    ],
)
def test_gains_count_what_follows_and_less_the_further_it_is(
    near: int, far: int, later: bool, weights: tuple[float, float]
) -> None:
    one = replace(record(0), near=near, far=far)
    if not later:
        one = replace(one, later=(), later_tokens=0)
    (episode,) = trace_episodes(HEADER, [one], RewardConfig(retention=0.5))
    following, rest = weights
    per_chunk = [32 * (following / 16 + rest / 8) * saved for saved in (0.0, 1.0, 2.0, -1.0)]
    assert episode.gains[0].tolist() == pytest.approx(per_chunk)


def test_gain_of_the_next_chunk_alone() -> None:
    (episode,) = trace_episodes(HEADER, [record(0)], RewardConfig(retention=0.0))
    assert episode.gains[0].tolist() == pytest.approx([0.0, 32 / 16, 64 / 16, -32 / 16])


def test_beginnings_stand_for_their_share_of_later_documents_only() -> None:
    """Weights 1 and ½ in the document, ¼ and ⅛ later, of which a quarter are beginnings."""
    within = replace(record(0), near=2, far=2)
    ending = replace(record(1), near=0, far=2, failures=(None,) * 4)
    reward = RewardConfig(retention=0.5, beginnings=0.25)
    (episode,) = trace_episodes(HEADER, [within, ending], reward)
    saved = (0.0, 1.0, 2.0, -1.0)
    near, far = 1.5 + 0.75 * 0.375, 0.25 * 0.375
    assert episode.gains[0].tolist() == pytest.approx(
        [32 * (near / 16 + far / 8) * nats for nats in saved]
    )
    # Inside later documents it counts what the other record saw inside its own: `saved` per 16.
    inside, begins = 0.75 * 1.5, 0.25 * 1.5
    assert episode.gains[1].tolist() == pytest.approx(
        [32 * (inside / 16 + begins * 2 / 24) * nats for nats in saved]
    )


def test_what_was_taken_back_or_not_learned_gains_nothing_inside_later_documents() -> None:
    within = replace(record(0), near=2, far=2)
    same = (16.0,) * 4
    ending = replace(
        record(1), near=0, far=2, next=same, later=same, failures=(None, *["norm"] * 3)
    )
    short = replace(record(2), near=0, far=2, own=(), next=(), later=(), failures=())
    reward = RewardConfig(retention=0.5, beginnings=0.25)
    (episode,) = trace_episodes(HEADER, [within, ending, short], reward)
    assert episode.gains[0].any()
    assert not episode.gains[1:].any()


def test_gains_inside_documents_are_the_mean_over_the_training_episodes_of_all_files() -> None:
    trained = replace(HEADER, episodes={"a#0": {"split": "train"}})
    held_out = replace(HEADER, episodes={"a#0": {"split": "test"}})
    more = replace(record(0), next=(32.0, 29.0, 30.0, 33.0))
    files = [(trained, [record(0)]), (held_out, [more]), (trained, [more])]
    assert inside_gains(files) == pytest.approx([0.0, 2 / 16, 2 / 16, -1 / 16])
    assert inside_gains([(held_out, [more])]) == pytest.approx([0.0, 3 / 16, 2 / 16, -1 / 16])


@pytest.mark.parametrize("beginnings", [-0.1, 1.1])
def test_share_of_beginnings_out_of_range_is_refused(beginnings: float) -> None:
    with pytest.raises(InvalidRequestError, match="beginnings"):
        RewardConfig(0.5, beginnings)


@pytest.mark.parametrize("retention", [-0.1, 1.1])
def test_retention_out_of_range_is_refused(retention: float) -> None:
    with pytest.raises(InvalidRequestError, match="retention"):
        RewardConfig(retention)
