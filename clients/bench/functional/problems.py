"""What the driver needs to know of a data set, whichever it is.

A *completion* is the part of a program that a model is asked for. A program is a problem's head,
a completion and the problem's tail; it passes when every check that is run after it passes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ponderttt.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Problem:
    """One program to be written.

    Args:
        task_id: names it in its data set.
        base_prompt: what a base model goes on from.
        chat_prompt: what a user says to a chat model.
        head: of every program for this problem, before the completion.
        checks: by name, the source that is run after a program; it raises where that is wrong.
        mutated: names of the functions and methods whose results `--self-test` makes wrong.
        solution: the data set's own completion.
        tail: of every program, after the completion.
        shown: of the completion, what `base_prompt` ends in already.
    """

    task_id: str
    base_prompt: str
    chat_prompt: str
    head: str
    checks: Mapping[str, str]
    mutated: frozenset[str]
    solution: str
    tail: str = ""
    shown: str = ""

    def program(self, completion: str) -> str:
        """What is run before the checks."""
        return self.head + completion + self.tail

    def asked(self, *, base: bool) -> list[Any]:
        """Everything that a model is asked and that decides whether it passes.

        Args:
            base: with what a base model is shown of the completion, which chat has no part in.
        """
        prompt = self.base_prompt if base else self.base_prompt.removesuffix(self.shown)
        return [
            *(self.task_id, prompt, self.chat_prompt, self.head, dict(self.checks)),
            # Results of before there were tails stay comparable.
            *([self.tail] if self.tail else []),
        ]

    def fingerprint(self, *, base: bool) -> str:
        """Of `asked`: 8 characters, after which a base model's goes on by 4 for what is shown."""
        return _hash(self.asked(base=False))[:8] + (_hash(self.shown)[:4] if base else "")


@dataclass(frozen=True, slots=True)
class Suite:
    """A data set as the driver takes it.

    Args:
        name: of the benchmark, as on the command line.
        source: where the problems come from.
        problems: in the data set's order.
        stops: texts at which a server may end a base model's answer; four at most, as OpenAI has
            it, and none that `cut` would keep.
        cut: from a base model's answer to the completion.
        checks_are: what each check stands for, where there are several per problem; else None.
    """

    name: str
    source: str
    problems: tuple[Problem, ...]
    stops: tuple[str, ...]
    cut: Callable[[str], str]
    checks_are: str | None = None

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for problem in self.problems:
            if problem.task_id in seen:
                raise InvalidRequestError(
                    "--data", f"{self.source} has task_id {problem.task_id!r} twice"
                )
            seen.add(problem.task_id)

    def only(self, names: Sequence[str] | None, limit: int | None) -> Suite:
        """A part of the suite.

        Args:
            names: task_ids, or what follows their slash; None for all.
            limit: the first so many of them; None for all.
        Raises:
            InvalidRequestError: there is no problem of such a name.
        """
        kept = self.problems
        if names:
            wanted = [self._named(name) for name in names]
            kept = tuple(problem for problem in kept if problem in wanted)
        return replace(self, problems=kept[:limit])

    def _named(self, name: str) -> Problem:
        for problem in self.problems:
            if name in (problem.task_id, problem.task_id.rpartition("/")[2]):
                return problem
        first, last = self.problems[0].task_id, self.problems[-1].task_id
        raise InvalidRequestError(
            "--problems", f"{self.source} has no {name!r}; it has {first} to {last}"
        )

    def fingerprint(self, *, base: bool) -> str:
        """Of all that `Problem.asked` has of its problems."""
        return _hash([each.asked(base=base) for each in self.problems])[:16]


def _hash(what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
