"""Results of live sessions: what one holds, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from ponderttt.adaptation.actions import Action, CostModel
from ponderttt.errors import InvalidRequestError, PonderError

_LISTS = ("nats", "tokens", "actions")


class LiveFormatError(PonderError):
    """A file of live results that is damaged."""


@dataclass(frozen=True, slots=True)
class LiveResult:
    """One method on one episode of T chunks.

    Args:
        episode, repository: read.
        method, budget: who decided.
        nats: [T], summed loss of each chunk, before it was learned.
        tokens: [T], predicted tokens of each chunk.
        actions: [T], as taken.
        rollbacks: updates that were taken back.
        made_with: digest of all that the result depends on: text, model, shape, rule, policy, seed.
    """

    episode: str
    repository: str
    method: str
    budget: float | None
    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    actions: tuple[int, ...]
    rollbacks: int
    made_with: str


def mean_costs(result: LiveResult, costs: Mapping[str, CostModel]) -> dict[str, float]:
    """× forward, by cost model."""
    return {
        name: float(np.mean([model[Action(action)] for action in result.actions]))
        for name, model in costs.items()
    }


def by_repository(results: Iterable[LiveResult]) -> dict[str, float]:
    """Nats per token of each repository."""
    nats: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for result in results:
        nats[result.repository] = nats.get(result.repository, 0.0) + sum(result.nats)
        tokens[result.repository] = tokens.get(result.repository, 0) + sum(result.tokens)
    return {name: nats[name] / tokens[name] for name in nats}


def open_results(path: Path) -> list[LiveResult]:
    """What a file holds; it is made where it is missing, and rid of a line that was cut off.

    Raises:
        InvalidRequestError: it cannot be read or written.
        LiveFormatError: it is damaged before its end.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        found = read_results(path)
        cut_torn_end(path)
    except OSError as error:
        raise InvalidRequestError("output", f"{path} cannot be written: {error}") from error
    return found


def cut_torn_end(path: Path) -> None:
    """Take off a last line that was not written to its end, so that others can follow."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)


def read_results(path: Path) -> list[LiveResult]:
    """Results of a file; a last line that was cut off is left out.

    Raises:
        OSError: it cannot be read.
        LiveFormatError: it is damaged before its end.
    """
    lines = path.read_bytes().split(b"\n")
    return [_result(path, number, line) for number, line in enumerate(lines[:-1], start=1)]


def _result(path: Path, number: int, line: bytes) -> LiveResult:
    try:
        values = json.loads(line)
        if not isinstance(values, dict):
            raise TypeError("not an object of JSON")
        known = {field.name for field in fields(LiveResult)}
        if odd := sorted(known ^ values.keys()):
            raise ValueError(f"unknown or missing: {', '.join(odd)}")
        return LiveResult(**{**values, **{name: tuple(values[name]) for name in _LISTS}})
    except (ValueError, TypeError) as error:
        raise LiveFormatError(
            f"{path}, line {number}: {error}; delete the line, or name another file"
        ) from error


def append_results(path: Path, results: Sequence[LiveResult]) -> None:
    """Add results to a file.

    Raises:
        InvalidRequestError: it cannot be written.
    """
    try:
        with path.open("a") as file:
            file.write("".join(json.dumps(asdict(result)) + "\n" for result in results))
    except OSError as error:
        raise InvalidRequestError("output", f"{path} cannot be written: {error}") from error
