"""Looking over result files before they are compared: kinds, data, values, and what is missing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clients import shapes
from clients.bench.asked import Asked, left_out, unlike
from clients.results import Header, Record
from clients.results import check_records as refuse
from ponderttt.errors import InvalidRequestError

#: Benchmarks of which `passed` tells for each sample whether it passed.
FUNCTIONAL = ("humaneval", "mbpp", "classeval")
# How to get the same data again.
_SAME_DATA = {
    "repo": "the same files, sizes and --seed",
    "load": "the same --texts, --prompt-tokens, --output-tokens, --reuse, --chars-per-token, kind "
    "of --think and --seed",
}
_VERDICT = shapes.fields({}, {"passed": shapes.or_null(shapes.boolean)})
_NAME = shapes.or_null(shapes.text)
_PLACE = shapes.fields({}, dict.fromkeys(("arm", "repository", "file", "record"), _NAME))


def check_kinds(files: Sequence[Path], headers: Sequence[Header]) -> None:
    """Raise InvalidRequestError where the files are of different benchmarks."""
    if len({header.kind for header in headers}) > 1:
        kinds = ", ".join(
            f"{path.name} is of {header.kind}" for path, header in zip(files, headers, strict=True)
        )
        raise InvalidRequestError(
            "files",
            f"different benchmarks measure different things: {kinds}; compare like with like",
        )
    if len({tuple(header.key_fields) for header in headers}) > 1:
        raise InvalidRequestError(
            "files", "they name their units by different fields; run the benchmarks again"
        )


def check_data(kind: str, asked: Mapping[Path, Asked], base: Path) -> None:
    """Raise InvalidRequestError where no unit of a file is the same as the base's of that name.

    Args:
        kind: of the benchmark.
        asked: what each file was asked.
        base: one of them.
    """
    for path, other in asked.items():
        if left_out(asked[base], other) is None:
            told = "; ".join(
                f"{name}: {base} {asked[base].settings[name]}, {path} {other.settings[name]}"
                for name in unlike(asked[base], other)
            )
            same = _SAME_DATA.get(kind, "the same --data, --limit and --problems")
            raise InvalidRequestError(
                "files",
                f"they were asked other things ({told}), so that units of one name can't be "
                f"paired. Run them on the same data ({same}), or give --unpaired to see their "
                "means beside each other, without differences",
            )


def check_records(path: Path, header: Header, records: Sequence[Record]) -> None:
    """Raise PonderError, naming file and line, where a record holds what can't be compared.

    That keys and metrics are what they should be has been seen to when the file was read.
    """
    check: shapes.Check = _PLACE
    if header.kind in FUNCTIONAL:
        check = _VERDICT
    elif header.kind == "load":
        from clients.load.summary import check_record

        check = check_record
    refuse(path, records, check)


def unfinished(header: Header, records: Sequence[Record]) -> str | None:
    """What there is of what was planned, as "unfinished: 5 of 12 answers".

    None where all is there, or where the file doesn't say how much was planned.
    """
    settings = header.settings
    if header.kind == "repo":
        if steps := _whole(settings, "steps"):
            return _unfinished_steps(steps[0], records)
        return _unfinished_repo(settings, records)
    if header.kind == "load":
        from clients.load.summary import unfinished as load_unfinished

        known = {"requests", "duration", "warmup"} <= settings.keys()
        told = load_unfinished(header, records) if known else None
        return told[0].lower() + told[1:].rstrip(".") if told else None
    planned = _whole(settings, "problems", "samples")
    if not planned or len(records) >= math.prod(planned):
        return None
    return f"unfinished: {len(records)} of {math.prod(planned)} answers"


def _unfinished_steps(planned: int, records: Sequence[Record]) -> str | None:
    from clients.bench.repo_run import RETAUGHT

    done = sum(record.get("record") != RETAUGHT for record in records)
    return f"unfinished: {done} of {planned} steps" if done < planned else None


def _unfinished_repo(settings: Mapping[str, Any], records: Sequence[Record]) -> str | None:
    """Of earlier versions, which don't say how many steps were planned.

    A file may have had fewer targets than asked for; arms of a repository have the same.
    """
    sizes = _whole(settings, "files", "targets")
    repositories, arms, unrelated = (
        found if isinstance(found := settings.get(name), list) else []
        for name in ("repositories", "arms", "unrelated")
    )
    if not (sizes and repositories and arms):
        return None
    targets: Counter[tuple[Any, Any]] = Counter()
    read = 0
    for record in records:
        targets[record.get("repository"), record.get("arm")] += record.get("record") == "target"
        read += record.get("record") == "unrelated"
    to_read = len(repositories) * sum(arm != "stuffed" for arm in arms) * len(unrelated)
    by_repository = [[targets[repository, arm] for arm in arms] for repository in repositories]
    if read >= to_read and all(0 < min(counts) == max(counts) for counts in by_repository):
        return None
    most = len(repositories) * len(arms) * math.prod(sizes) + to_read
    return f"unfinished: {targets.total() + read} of at most {most} targets and unrelated files"


def _whole(settings: Mapping[str, Any], *names: str) -> list[int]:
    """Settings that are whole numbers; none where one of them is something else."""
    values = [value for name in names if isinstance(value := settings.get(name), int)]
    return values if len(values) == len(names) else []
