"""The arms that the repository benchmark compares, and what an arm's session does in which order.

An arm `gate@budget` learns under that budget. `random` and `fixed` follow it: they get what it
spent, as a share of chunks that are updated (`rate`) or as measured cost, which stands for wall
time (`time`), and spend it on chunks drawn at random, or on every chunk as long as it lasts.

Neither is an exact match, since a client can give the server a gate and a budget, but can't say
which chunk to update (a chunk sent as a document of its own would be read without what precedes
it). The server's ledger holds the budget over a request and over any 64 chunks in a row:

- `random` draws each chunk by itself and loses the draws that the ledger refuses, which nothing
  makes up for. It stays about three points below the rate that it follows: 0.22 for 0.25, 0.47 for
  0.5, 0.72 for 0.75.
- `fixed` meets the rate, but not evenly: the updates come at the beginning of a lesson, and then in
  runs. At 0.25 it updates 16 chunks, skips 48, updates 16, and so on.

What an arm has taken in the end stands in the table as its update rate.

The rate counts chunks, whatever was done with them: where the lead takes UPDATE_2 or UPDATE_4, an
arm that follows its rate, always by UPDATE_1, gets less compute. One that follows its time doesn't,
but updates on more chunks; so both are run unless `--match` says otherwise.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from clients.bench.repo_plan import Plan, Repository, Subject
from clients.bench.repo_targets import Target
from clients.files import TextFile
from ponderttt.errors import InvalidRequestError

ArmKind = Literal["off", "stuffed", "adapt", "random", "fixed"]
Match = Literal["rate", "time"]
# As the server's nominal cost model has them, × forward.
_SKIP, _UPDATE_1 = 1.0, 3.0
# Documents of one adapt request, as many as `ponderttt adapt` sends.
_LESSON_FILES = 64


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of answering.

    Args:
        name: in the result file.
        kind: `off` has no session, `stuffed` neither, but the context in its prompt.
        gate: who decides; None is the server's default.
        budget: highest mean cost per chunk; None for arms that follow another.
        follows: the arm whose spending this one matches.
        match: in what.
    """

    name: str
    kind: ArmKind
    gate: str | None = None
    budget: float | None = None
    follows: str | None = None
    match: Match | None = None

    @property
    def learns(self) -> bool:
        """Whether it has a session."""
        return self.kind not in ("off", "stuffed")


def make_arms(
    kinds: Sequence[ArmKind], gate: str | None, budgets: Sequence[float], matches: Sequence[Match]
) -> tuple[Arm, ...]:
    """The arms in the order in which they run: what is followed comes before what follows.

    Raises:
        InvalidRequestError: an arm has none to follow.
    """
    if "adapt" not in kinds and {"random", "fixed"} & set(kinds):
        raise InvalidRequestError(
            "--arm", "random and fixed spend what adapt has spent; give --arm adapt, too"
        )
    arms = [Arm("off", "off")]
    if "stuffed" in kinds:
        arms.append(Arm("stuffed", "stuffed"))
    for budget in dict.fromkeys(budgets) if "adapt" in kinds else ():
        lead = Arm(f"{gate or 'adapt'}@{budget:g}", "adapt", gate, budget)
        arms.append(lead)
        for kind in ("random", "fixed"):
            if kind in kinds:
                arms += [
                    Arm(f"{kind}={match}({lead.name})", kind, kind, None, lead.name, match)
                    for match in matches
                ]
    return tuple(arms)


def adapt_options(
    arm: Arm, lessons: Sequence[Mapping[str, Any]], chunk_size: int | None, seed: int
) -> dict[str, Any]:
    """Options of the arm's adapt requests.

    Args:
        arm: one that learns.
        lessons: records of the arm that it follows, if any.
        chunk_size: None is the server's default.
        seed: of gate `random`.
    """
    options: dict[str, Any] = {"gate": arm.gate, "budget": arm.budget, "chunk_size": chunk_size}
    if arm.kind in ("random", "fixed"):
        options |= _matched(arm, lessons)
    if arm.kind == "random" or arm.gate == "random":
        options["seed"] = seed
    if arm.gate == "fixed":
        options["action"] = "UPDATE_1"
    return {name: value for name, value in options.items() if value is not None}


def _matched(arm: Arm, lessons: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    chunks = sum(lesson["chunks"] for lesson in lessons)
    if arm.match == "time":
        spent = sum(lesson["measured"] * lesson["chunks"] for lesson in lessons) / max(chunks, 1)
        return {"budget": max(spent, _SKIP), "cost_model": "measured"}
    # The random gate draws only for chunks that can be learned; the ledger counts them all.
    of = sum(lesson["eligible"] for lesson in lessons) if arm.kind == "random" else chunks
    rate = sum(lesson["updates"] for lesson in lessons) / max(of, 1)
    return {"budget": _SKIP + rate * (_UPDATE_1 - _SKIP), "cost_model": "nominal"}


@dataclass(frozen=True, slots=True)
class Lesson:
    """Files to teach; `number` counts from 0 within an arm of a repository."""

    number: int
    files: tuple[TextFile, ...]

    @property
    def unit(self) -> str:
        """Names it within its arm and repository."""
        return f"lesson {self.number}"


@dataclass(frozen=True, slots=True)
class Question:
    """A target to ask for."""

    subject: Subject
    target: Target

    @property
    def unit(self) -> str:
        """Names it within its arm and repository."""
        return f"{self.subject.file.path}:{self.target.name}"


@dataclass(frozen=True, slots=True)
class Reading:
    """A piece of unrelated code to be scored."""

    file: TextFile

    @property
    def unit(self) -> str:
        """Names it within its arm and repository."""
        return f"unrelated {self.file.path}"


Step = Lesson | Question | Reading


def steps(plan: Plan, repository: Repository, arm: Arm) -> Iterator[Step]:
    """What happens in one arm: a file is taught only after its targets were asked for.

    Unrelated code is read at the end. In the arm `off` nothing is ever learned, so what it reads
    there is every session's loss from before.
    """
    number = 0
    if arm.learns:
        for start in range(0, len(repository.context), _LESSON_FILES):
            yield Lesson(number, repository.context[start : start + _LESSON_FILES])
            number += 1
    for subject in repository.subjects:
        for target in subject.targets:
            yield Question(subject, target)
        if arm.learns:
            yield Lesson(number, (subject.file,))
            number += 1
    if arm.kind != "stuffed":
        for file in plan.unrelated:
            yield Reading(file)


def session_name(run: str, repository: Repository, arm: Arm) -> str:
    """What the server calls the arm's session: at most 128 letters, digits, '.', '_' and '-'.

    Args:
        run: of the result file's header.
        repository, arm: whose session it is.
    """
    # What is readable may be the same for two, or cut off.
    key = hashlib.sha256(f"{run}/{repository.name}/{arm.name}".encode()).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{repository.name}-{arm.name}").strip("-")
    return f"bench-{key[:16]}-{readable}"[:128]
