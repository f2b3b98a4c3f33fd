"""Full-information traces: what each of the four actions would have bought, chunk by chunk.

One UPDATE_4 passes through the states of UPDATE_1 and UPDATE_2, so one write gives the outcome of
all four actions from one state of a session.

A trace file has one JSON object per line: a header, then one record per chunk, in the order in
which they were collected. It is only ever appended to, so an interrupted collection loses one
line at most.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.features import FEATURE_NAMES, FEATURE_VERSION
from ponderttt.errors import PonderError

FORMAT_VERSION = 1

_LOG = logging.getLogger(__name__)


class TraceFormatError(PonderError):
    """A trace file that is damaged, or was made for something else."""


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """What holds for all records of a file.

    Args:
        base_model: whose chunks.
        chunk_size: tokens per chunk.
        peek_tokens: rows on which an outcome is measured, per place.
        behaviour: probability with which each action was really taken.
        seed: of the episodes and of the behaviour.
        settings: of the update and the episodes, for provenance.
        episodes: of each episode: repository, chunks, and split.
        feature_version, format_version: must be this program's.
    """

    base_model: str
    chunk_size: int
    peek_tokens: int
    behaviour: tuple[float, float, float, float]
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    episodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    feature_version: int = FEATURE_VERSION
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """One chunk of one episode; lists of four are by action.

    Args:
        episode: its name.
        index: of the chunk in the episode, from 0.
        tokens: of the chunk.
        loss: of the chunk as it was read, nats per token; None for a lone first token.
        features: 32, with the history of the episode as it was run.
        own: the chunk's own loss after each action, nats per token; empty where it is too short
            to be learned.
        next: summed loss, in nats, of the looked-at tokens of the chunk that follows, after each
            action; empty where none follows or the chunk is too short to be learned.
        next_tokens: how many tokens were looked at; predicted ones only.
        later, later_tokens: the same for the beginnings of later documents, added up.
        near, far: chunks that follow in the same document, and in later ones.
        failures: why each action would have been rolled back (its outcome is SKIP's then).
        action: the one really taken.
    """

    episode: str
    index: int
    tokens: int
    loss: float | None
    features: tuple[float, ...]
    own: tuple[float, ...]
    next: tuple[float, ...]
    next_tokens: int
    later: tuple[float, ...]
    later_tokens: int
    near: int
    far: int
    failures: tuple[str | None, ...]
    action: int

    @property
    def learnable(self) -> bool:
        """Whether the chunk was long enough to be learned."""
        return bool(self.own)


class TraceWriter:
    """Appends records to a trace file.

    Args:
        path: made with its header where it is missing; else it must have the same header.
        header: of the file.
    Raises:
        TraceFormatError: the file belongs to another collection.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, header: TraceHeader) -> None:
        self.path = path
        self.records: list[TraceRecord] = []
        if path.exists():
            found, self.records = read_traces(path)
            _check_same(path, found, header)
            _cut_unfinished_line(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(header)) + "\n")
        self._file: IO[str] = path.open("a")

    def append(self, records: Iterable[TraceRecord]) -> None:
        """Add records and see to it that they survive a crash."""
        for record in records:
            self._file.write(json.dumps(asdict(record)) + "\n")
            self.records.append(record)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_traces(path: Path) -> tuple[TraceHeader, list[TraceRecord]]:
    """Header and records of a trace file; a last line that was cut off is left out and logged.

    Raises:
        TraceFormatError: damaged before its end, another format, or other features.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceFormatError(f"{path}: cannot be read: {error}") from error
    lines = text.split("\n")
    if lines[-1]:
        _LOG.warning("%s: its last line is cut off; leaving it out", path)
    whole = lines[:-1]
    if not whole:
        raise TraceFormatError(f"{path}: has no header; delete it and collect again")
    header = _header(path, whole[0])
    return header, [_record(path, number, line) for number, line in _numbered(whole)]


def _numbered(lines: list[str]) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(lines[1:], start=2))


def _header(path: Path, line: str) -> TraceHeader:
    values = _object(path, 1, line)
    for name, wanted in (("format_version", FORMAT_VERSION), ("feature_version", FEATURE_VERSION)):
        if values.get(name) != wanted:
            raise TraceFormatError(
                f"{path}: {name} is {values.get(name)!r}, this program needs {wanted}; "
                "collect again"
            )
    _check_fields(path, 1, values, TraceHeader)
    values["behaviour"] = tuple(values["behaviour"])
    return TraceHeader(**values)


def _record(path: Path, number: int, line: str) -> TraceRecord:
    values = _object(path, number, line)
    _check_fields(path, number, values, TraceRecord)
    for name in ("features", "own", "next", "later", "failures"):
        values[name] = tuple(values[name])
    record = TraceRecord(**values)
    widths = {"features": {len(FEATURE_NAMES)}, "own": {0, 4}, "next": {0, 4}, "later": {0, 4}}
    for name, allowed in widths.items():
        if len(getattr(record, name)) not in allowed:
            raise TraceFormatError(
                f"{path}, line {number}: {name} has {len(getattr(record, name))} values"
            )
    if record.action not in tuple(Action):
        raise TraceFormatError(f"{path}, line {number}: action {record.action} does not exist")
    return record


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise TraceFormatError(f"{path}, line {number}: {error}") from error
    if not isinstance(values, dict):
        raise TraceFormatError(f"{path}, line {number}: not a JSON object")
    return values


def _check_fields(path: Path, number: int, values: dict[str, Any], kind: type) -> None:
    known = {f.name for f in fields(kind)}
    if odd := sorted(known ^ values.keys()):
        raise TraceFormatError(f"{path}, line {number}: unknown or missing: {', '.join(odd)}")


def _check_same(path: Path, found: TraceHeader, wanted: TraceHeader) -> None:
    ours = json.loads(json.dumps(asdict(wanted)))
    theirs = json.loads(json.dumps(asdict(found)))
    for name, value in ours.items():
        if theirs[name] != value:
            raise TraceFormatError(
                f"{path}: was collected with another {name}; name another file, or delete this one"
            )


def _cut_unfinished_line(path: Path) -> None:
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
