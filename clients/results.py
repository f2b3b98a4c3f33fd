"""The result file of every benchmark: JSON lines, so that an interrupted run loses nothing.

The first line is the header: what was measured, with which settings. Then one record per unit of
work. The same command run again reads the file, checks that the header is its own, and goes on.

Conventions that `ponderttt bench compare` relies on: a record holds its key fields, the metrics
that the header names (number, true/false, or null where there is none) and whatever else is worth
keeping. A field `arm` names the variant measured; records that differ only in `sample` are repeats
of one unit.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal, Self

from filelock import FileLock, Timeout

from clients import shapes
from ponderttt.errors import InvalidRequestError, PonderError

Record = dict[str, Any]
Key = tuple[Any, ...]
#: Which way a metric is good.
Better = Literal["higher", "lower"]

FORMAT = 1
#: How the names of the server's own settings begin.
SERVER = "server."
# A run goes on only where these agree; the address and the time may change.
_SAME = ("kind", "seed", "model", "server_version", "settings", "key_fields")

_KEY = shapes.scalar(
    "a text or a number", lambda value: value is None or isinstance(value, str | int | float)
)
_METRIC = shapes.or_null(
    shapes.scalar(
        "a number, true or false, or null",
        lambda value: isinstance(value, bool) or shapes.is_number(value),
    )
)
_HEADER = shapes.fields(
    {
        "kind": shapes.text,
        "seed": shapes.count,
        "model": shapes.text,
        "base_url": shapes.text,
        "settings": shapes.fields({}),
        "key_fields": shapes.each(shapes.text),
        "metrics": shapes.fields({}),
    }
)
_MEND = (
    "mend or remove the line (its unit of work is then done again; in `bench repo`, where what "
    "follows in an arm that learns depends on it, remove the later lines of the same repository "
    "and arm, too)"
)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, slots=True)
class Header:
    """What a result file is about.

    Args:
        kind: the benchmark, as it is called on the command line.
        seed: of everything drawn at random.
        model: as the server names it.
        base_url: where the server was when the run began.
        server_version: None where the server doesn't tell.
        settings: everything else that may change a result; only what JSON can hold. The server's
            own are those of `Client.server_settings`.
        key_fields: fields of a record that together name its unit of work.
        metrics: fields of a record that are compared, and which way is better.
        started: ISO 8601.
        run: no other run has it, and one that goes on keeps it; for names on a server that others
            use, too.
    """

    kind: str
    seed: int
    model: str
    base_url: str
    server_version: str | None
    settings: Mapping[str, Any]
    key_fields: Sequence[str]
    metrics: Mapping[str, Better]
    started: str = field(default_factory=_now)
    run: str = field(default_factory=lambda: secrets.token_hex(8))

    def as_dict(self) -> Record:
        """The first line of the file, as JSON gives it back."""
        line = {
            "format": FORMAT,
            "kind": self.kind,
            "seed": self.seed,
            "model": self.model,
            "base_url": self.base_url,
            "server_version": self.server_version,
            "settings": dict(self.settings),
            "key_fields": list(self.key_fields),
            "metrics": dict(self.metrics),
            "started": self.started,
            "run": self.run,
        }
        answer: Record = json.loads(json.dumps(line, allow_nan=False))
        return answer


class ResultFile:
    """A result file that is being written. Use `ResultFile.open`; it is a context manager.

    `append` may be called from several threads.

    Attributes:
        header: the file's (of the first run, if this one goes on).
        records: those of earlier runs and those appended, in the file's order.
        done: keys of the units that need no more work.
        resumed: how many records were there already.
    """

    def __init__(
        self,
        path: Path,
        header: Header,
        records: list[Record],
        stream: IO[bytes],
        lock: FileLock,
        fresh: bool,
    ) -> None:
        self.path = path
        self.header = header
        self.records = records
        self.resumed = len(records)
        self._stream = stream
        self._lock = lock
        self._fresh = fresh
        self._threads = threading.Lock()
        self.done: set[Key] = {self.key(record) for record in records}

    @classmethod
    def open(
        cls,
        path: Path,
        header: Header,
        *,
        fresh: bool = False,
        check: shapes.Check | None = None,
    ) -> Self:
        """Begin a file, or go on with one that this very run began.

        A last line that was cut off while it was written is dropped: its unit is done again.

        Args:
            path: made if missing, with its directories.
            header: of this run.
            fresh: throw an existing file away instead of going on with it.
            check: what records must hold besides what the header says.
        Raises:
            InvalidRequestError: the file is of a run with other settings, or is no result file.
            PonderError: the file is damaged, in use, or can't be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_name(f".{path.name}.lock"))
            lock.acquire(timeout=0)
        except Timeout:
            raise PonderError(
                f"{path} is being written by another run; wait for it or name another file"
            ) from None
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            kept, records, size = (None, [], 0) if fresh else _read(path)
            if kept is not None:
                _check_same(path, kept, header)
            check_records(path, records, check)
            stream = path.open("r+b" if path.exists() else "w+b")
            stream.truncate(size)
            stream.seek(size)
            opened = cls(path, kept or header, records, stream, lock, fresh)
            if kept is None:
                opened._write(header.as_dict())
        except OSError as error:
            lock.release()
            raise _unwritable(path, error) from error
        except BaseException:
            lock.release()
            raise
        return opened

    def key(self, record: Mapping[str, Any]) -> Key:
        """What names the unit of work of `record`, a tuple in the order of `key_fields`."""
        try:
            return tuple(record[name] for name in self.header.key_fields)
        except KeyError as error:
            raise PonderError(
                f"{self.path}: a record has no field {error}; it is damaged"
            ) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Keep one finished unit of work; it is on disk when this returns.

        Args:
            record: with the key fields; only what JSON can hold.
        Raises:
            PonderError: the file can't be written, say because the disk is full.
        """
        with self._threads:
            self._write(record)
            self.records.append(dict(record))
            self.done.add(self.key(record))

    def how_to_go_on(self) -> str:
        """For the message of a run that ends too early."""
        # With it, the same command would throw away what this run has done.
        return f"run the same command again{' without --fresh' if self._fresh else ''} to go on"

    def _write(self, line: Mapping[str, Any]) -> None:
        raw = json.dumps(line, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        try:
            self._stream.write(raw + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def close(self) -> None:
        """Close the file and let others have it."""
        try:
            # Whole records are on disk; only one whose `append` has failed can be left to write.
            with suppress(OSError):
                self._stream.close()
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_results(path: Path) -> tuple[Header, list[Record]]:
    """The header and the records of a result file, also of one that is still being written.

    Raises:
        InvalidRequestError: there is no such file, or it is no result file.
        PonderError: it is damaged or can't be read.
    """
    try:
        header, records, _ = _read(path)
    except OSError as error:
        raise PonderError(f"{path} can't be read: {error.strerror}") from error
    if header is None:
        raise InvalidRequestError("path", f"{path} doesn't exist or is empty; give a result file")
    return header, records


def _read(path: Path) -> tuple[Header | None, list[Record], int]:
    """Header, records, and bytes of whole lines."""
    if not path.exists():
        return None, [], 0
    raw = path.read_bytes()
    # Only a line with its end was written whole.
    size = raw.rfind(b"\n") + 1
    lines = raw[:size].splitlines()
    if not lines:
        if raw and not raw.startswith(b'{"format"'):
            raise _foreign(path)
        return None, [], 0
    header = _header(path, lines[0])
    records = [_object(path, number, line) for number, line in enumerate(lines[1:], 2)]
    check_records(path, records, _check_of(header))
    return header, records, size


def check_records(path: Path, records: Sequence[Record], check: shapes.Check | None) -> None:
    """Refuse a file with a record that a report would stumble over.

    Args:
        path: of the file.
        records: all that it has, in its order.
        check: what each must hold; None: anything.
    Raises:
        PonderError: one doesn't.
    """
    # The header is line 1.
    for line, record in enumerate(records, 2):
        wrong = shapes.fault("", record, check) if check is not None else None
        if wrong is not None:
            raise PonderError(f"{path} is damaged, line {line}: {wrong}; {_MEND}")


def _check_of(header: Header) -> shapes.Check:
    """What the header says of records: they have their keys, and numbers as metrics."""
    return shapes.fields(
        dict.fromkeys(header.key_fields, _KEY), dict.fromkeys(header.metrics, _METRIC)
    )


def _header(path: Path, line: bytes) -> Header:
    try:
        fields = json.loads(line)
        if fields.pop("format") != FORMAT:
            raise InvalidRequestError(
                "path", f"{path} has another format than {FORMAT}; run the benchmark again"
            )
        # Files of earlier versions have none.
        fields.setdefault("run", fields["started"])
        header = Header(**fields)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise _foreign(path) from error
    wrong = shapes.fault("", fields, _HEADER)
    if wrong is not None:
        raise PonderError(f"{path} is damaged, line 1: {wrong}; mend the line or name another file")
    return header


def _object(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise PonderError(f"{path} is damaged, line {number}: no JSON object; {_MEND}")
    return record


def _check_same(path: Path, kept: Header, header: Header) -> None:
    old, new = kept.as_dict(), header.as_dict()
    differing = [
        f"{name} {old[name]!r}, now {new[name]!r}"
        for name in _SAME
        if name != "settings" and old[name] != new[name]
    ]
    ours, servers, noted = _differing_settings(old["settings"], new["settings"])
    differing += ours + servers
    if not noted:
        also = f", of a run with {'; '.join(differing)}" if differing else ""
        raise InvalidRequestError(
            "output",
            f"{path} was begun by a version that did not note the server's settings{also}; it can "
            "be compared but not gone on with: name another file with --output, or give --fresh",
        )
    if differing:
        start = " and start the server as it was then" if servers else ""
        raise InvalidRequestError(
            "output",
            f"{path} is of a run with {'; '.join(differing)}. Give the same settings{start} to go "
            "on with it, or name another file with --output",
        )


def _differing_settings(old: Record, new: Record) -> tuple[list[str], list[str], bool]:
    """What to say of settings that differ, of the run's own and of the server's.

    And whether the server's can be told: not where it has some that the old ones lack altogether.
    """
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    lines = {name: f"{name} {old.get(name)!r}, now {new.get(name)!r}" for name in names}
    ours = [line for name, line in lines.items() if not name.startswith(SERVER)]
    servers = [line for name, line in lines.items() if name.startswith(SERVER)]
    told = [any(name.startswith(SERVER) for name in settings) for settings in (old, new)]
    if told == [False, True]:
        return ours, [], False
    if told == [True, False]:
        servers = ["settings of the server, which now tells none"]
    return ours, servers, True


def _foreign(path: Path) -> InvalidRequestError:
    return InvalidRequestError("path", f"{path} is no result file; name another")


def _unwritable(path: Path, error: OSError) -> PonderError:
    return PonderError(f"{path} can't be written: {error.strerror or error}")
