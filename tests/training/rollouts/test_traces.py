"""Trace files: what is written comes back, and what was cut off is left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from training.analysis.gains import RewardConfig, trace_episodes
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
        later=(16.0, 15.0, 14.0, 17.0), later_tokens=8,
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


def test_gains_are_what_the_following_text_saves() -> None:
    (episode,) = trace_episodes(HEADER, [record(0)], RewardConfig(1.0, 2.0))
    assert episode.gains.tolist() == [[0.0, 1 / 16 + 2 / 8, 2 / 16 + 4 / 8, -1 / 16 - 2 / 8]]
