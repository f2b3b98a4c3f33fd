"""Whether units of one name are the same in two result files: asked alike, of the same data.

A file's settings tell of all its units at once. Where those differ, parts of the files may still
be the same: a repository, the unrelated code, a problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clients.results import Header, Record

#: Of the repository benchmark; names no repository.
UNRELATED = "the unrelated code"
# Settings that hold a hash of all that was asked for.
_HASHES = ("problems_hash", "texts")
# Those from which a load's prompts and the lengths of its answers are drawn.
_DRAWN = ("prompt_tokens", "output_tokens", "reuse", "chars_per_token")


@dataclass(frozen=True, slots=True)
class Asked:
    """What the units of a file were asked, as far as the file tells.

    Args:
        settings: where they agree, all units of one name are the same.
        parts: hash by part.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)


def asked_of(header: Header, records: Sequence[Record]) -> Asked:
    """What a file tells; those of earlier versions know of no parts."""
    told = header.settings
    names = _HASHES + (_DRAWN if header.kind == "load" else ())
    settings = {name: told[name] for name in names if told.get(name) is not None}
    if header.kind == "load":
        settings["seed"] = header.seed
        # One of these is drawn before each prompt, from the same generator.
        if isinstance(think := told.get("think"), str):
            settings["think"] = think.partition(":")[0] if ":" in think else "constant"
    return Asked(settings, _parts(told, records))


def _parts(settings: Mapping[str, Any], records: Sequence[Record]) -> dict[str, str]:
    repositories = settings.get("repository_texts")
    known = {
        part_of({"repository": name}): value
        for name, value in (repositories.items() if isinstance(repositories, Mapping) else ())
    }
    known |= {part_of(each): each["problem_hash"] for each in records if "problem_hash" in each}
    known[UNRELATED] = settings.get("unrelated_texts")
    return {part: value for part, value in known.items() if isinstance(value, str)}


def part_of(record: Mapping[str, Any]) -> str:
    """To what a record's unit belongs."""
    if record.get("record") == "unrelated":
        return UNRELATED
    if "repository" in record:
        return f"repository {record['repository']}"
    return f"problem {record.get('task_id')}"


def unlike(one: Asked, other: Asked) -> list[str]:
    """Settings that both have, and that are not the same; where a file doesn't tell, they are."""
    return [
        name
        for name, value in one.settings.items()
        if name in other.settings and other.settings[name] != value
    ]


def alike(one: Asked, other: Asked, part: str) -> bool:
    """Whether the units of a part are the same in both."""
    return not unlike(one, other) or _same_part(one, other, part)


def _same_part(one: Asked, other: Asked, part: str) -> bool:
    here, there = one.parts.get(part), other.parts.get(part)
    if here is None or there is None:
        return False
    # A problem's hash goes on where a base model is shown more of it; see `Problem.fingerprint`.
    return here.startswith(there) or there.startswith(here)


def left_out(one: Asked, other: Asked) -> list[str] | None:
    """Parts that only one has, or that are not the same; None where nothing is the same."""
    if not unlike(one, other):
        return []
    parts = list(dict.fromkeys([*one.parts, *other.parts]))
    same = {part for part in parts if _same_part(one, other, part)}
    # Unrelated code is read in the sessions of repositories, so it is nothing without one.
    if not (one.parts.keys() & other.parts.keys()) - {UNRELATED} or not same:
        return None
    return [part for part in parts if part not in same]
