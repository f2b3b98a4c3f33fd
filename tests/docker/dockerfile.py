"""A reader for our own Dockerfile: stages and their instructions, in order."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"

_FLAG = re.compile(r"--([a-z-]+)=(\S+)\s+")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Args:
        name: `RUN`, `COPY`, …
        flags: `--from=build` → {"from": "build"}; the last of each name.
        value: the rest, continuation lines joined.
    """

    name: str
    flags: dict[str, str]
    value: str

    @property
    def words(self) -> list[str]:
        """The value, split: a JSON array's items, else as a shell splits them."""
        if self.value.startswith("["):
            words: list[str] = json.loads(self.value)
            return words
        return shlex.split(self.value)


@dataclass(frozen=True, slots=True)
class Stage:
    """What follows a `FROM`."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


def read_stages(text: str) -> dict[str, Stage]:
    """The stages by name.

    Raises:
        ValueError: an instruction before the first stage, or a stage without a name.
    """
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in _lines(text):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            if not stage:
                raise ValueError(f"{line!r} names no stage; write FROM {base} AS NAME")
            current = stages[stage] = Stage(stage, base)
        elif current is None:
            raise ValueError(f"{line!r} stands before the first FROM")
        else:
            current.instructions.append(_instruction(name, rest))
    return stages


def lineage(stages: dict[str, Stage], target: str) -> list[Stage]:
    """The stages that make up `target`, the base image's first; those copied from are not in it."""
    found = [stages[target]]
    while found[0].base in stages:
        found.insert(0, stages[found[0].base])
    return found


def _lines(text: str) -> list[str]:
    kept = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [line.strip() for line in "\n".join(kept).replace("\\\n", " ").splitlines() if line]


def _instruction(name: str, rest: str) -> Instruction:
    rest, flags = rest.strip(), {}
    while match := _FLAG.match(rest):
        flags[match[1]] = match[2]
        rest = rest[match.end() :].strip()
    if name == "HEALTHCHECK" and rest.startswith("CMD"):
        rest = rest.removeprefix("CMD").strip()
    return Instruction(name, flags, rest)
