"""Running the repository benchmark: every step's result is on disk before the next begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clients.api import ServerError
from clients.bench.repo_arms import (
    Arm,
    Lesson,
    Question,
    Reading,
    Step,
    adapt_options,
    session_name,
    steps,
)
from clients.bench.repo_ask import Asking, Stuffing, ask, measure_loss
from clients.bench.repo_exam import Exam
from clients.bench.repo_plan import Plan, Repository
from clients.files import TextFile
from clients.results import Record, ResultFile

if TYPE_CHECKING:
    from clients.api import Client

# Chunks that no gate could have learned.
_INELIGIBLE = ("short", "seen")
_BUSY_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Schedule:
    """What is run.

    Args:
        plan: repositories and unrelated code.
        arms: in their order.
        chunk_size: of lessons; None is the server's default.
        seed: of gate `random`.
        keep_sessions: don't delete them at the end of their arm.
        run: of the result file's header; no other run's sessions have the same names.
    """

    plan: Plan
    arms: tuple[Arm, ...]
    chunk_size: int | None
    seed: int
    keep_sessions: bool
    run: str = ""

    def units(self) -> int:
        """Steps of all arms and repositories."""
        return sum(
            1
            for repository in self.plan.repositories
            for arm in self.arms
            for _ in steps(self.plan, repository, arm)
        )

    def session(self, repository: Repository, arm: Arm) -> str:
        """What the server calls the arm's session."""
        return session_name(self.run, repository, arm)


@dataclass(slots=True)
class Runner:
    """Runs a schedule from wherever an earlier run left off.

    Args:
        client: of the server.
        asking: how targets are asked for.
        schedule: what is run.
        results: open; what it has is not done again.
        stuffing: for the arm `stuffed`; None where it is not run.
        done: called with every new record.
        warn: called with what a user should know.
        exam: taken in each session that has learned under a budget; None: none.
    """

    client: Client
    asking: Asking
    schedule: Schedule
    results: ResultFile
    stuffing: Stuffing | None
    done: Callable[[Record], None]
    warn: Callable[[str], None]
    exam: Exam | None = None
    _prefixes: dict[tuple[str, str], str] = field(default_factory=dict)

    def run(self) -> None:
        """All that is left to do.

        Raises:
            PonderError: the server fails; the same call goes on later.
        """
        if self.exam is not None:
            self.exam.take("off", None)
        for repository in self.schedule.plan.repositories:
            for arm in self.schedule.arms:
                self._run_arm(repository, arm)

    def _run_arm(self, repository: Repository, arm: Arm) -> None:
        todo = list(steps(self.schedule.plan, repository, arm))
        keys = [(repository.name, arm.name, step.unit) for step in todo]
        first = next((i for i, key in enumerate(keys) if key not in self.results.done), len(todo))
        session = None
        examined = f"{repository.name}-{arm.name}" if arm.kind == "adapt" else None
        due = examined is not None and self._is_exam_due(repository, arm, examined)
        if arm.learns:
            session = self.schedule.session(repository, arm)
            if first < len(todo) or due or self.schedule.keep_sessions:
                taught = [step for step in todo[:first] if isinstance(step, Lesson)]
                self._restore(repository, arm, session, taught)
        for step in todo[first:]:
            record = {"repository": repository.name, "arm": arm.name, "unit": step.unit}
            record |= self._do(repository, arm, step, session)
            self.results.append(record)
            self.done(record)
        if self.exam is not None and examined is not None and due:
            self.exam.take(examined, session, self._digest(repository, arm))
        if session is not None and not self.schedule.keep_sessions:
            self._forget(session)

    def _is_exam_due(self, repository: Repository, arm: Arm, title: str) -> bool:
        return self.exam is not None and self.exam.is_due(title, self._digest(repository, arm))

    def _digest(self, repository: Repository, arm: Arm) -> str | None:
        """Of what the arm's session has learned so far."""
        lessons = self._lessons(repository, arm)
        return lessons[-1]["digest"] if lessons else None

    def _do(
        self, repository: Repository, arm: Arm, step: Step, session: str | None
    ) -> dict[str, Any]:
        match step:
            case Lesson() if session is not None:
                return {"record": "lesson"} | self._teach(repository, arm, step, session)
            case Question():
                return {"record": "target"} | self._ask(repository, arm, step, session)
            case Reading():
                return {"record": "unrelated"} | self._read(step.file, session)
            case _:
                raise RuntimeError(f"arm {arm.name} has lessons but no session")

    def _ask(
        self, repository: Repository, arm: Arm, question: Question, session: str | None
    ) -> dict[str, Any]:
        subject, target = question.subject, question.target
        stuffing = ""
        if arm.kind == "stuffed" and self.stuffing is not None:
            key = (repository.name, subject.file.path)
            if key not in self._prefixes:
                before = _before(repository, subject.file)
                self._prefixes[key] = self.stuffing.prefix(before, subject.file, subject.targets)
            stuffing = self._prefixes[key]
        lessons = self._lessons(repository, arm)
        return {
            "file": subject.file.path,
            "kind": target.kind,
            "learned_tokens": sum(lesson["learned_tokens"] for lesson in lessons),
            "version": lessons[-1]["version"] if lessons else 0,
            **ask(self.client, self.asking, subject.file, target, stuffing, session),
        }

    def _read(self, file: TextFile, session: str | None) -> dict[str, Any]:
        loss = measure_loss(self.client, self.asking, "", file.text, session)
        return {"unrelated_loss": loss.nats / max(loss.tokens, 1), "unrelated_tokens": loss.tokens}

    def _teach(
        self, repository: Repository, arm: Arm, lesson: Lesson, session: str
    ) -> dict[str, Any]:
        options = self._options(repository, arm)
        documents = [{"path": file.path, "text": file.text} for file in lesson.files]
        chunks: list[Mapping[str, Any]] = []
        report: Mapping[str, Any] = {}
        for event in self.client.adapt(session, documents, options):
            if event["object"] == "session.adaptation":
                report = event
            else:
                chunks.append(event)
        state = self.client.session(session) or {}
        return {
            "options": options,
            "gate": report["gate"],
            "files": [file.path for file in lesson.files],
            "tokens": report["tokens"],
            "chunks": len(chunks),
            "eligible": sum(chunk["reason"] not in _INELIGIBLE for chunk in chunks),
            "updates": sum(chunk["action"] != "SKIP" for chunk in chunks),
            "learned_tokens": sum(_learned(chunk) for chunk in chunks),
            "nominal": report["cost"]["nominal"],
            "measured": report["cost"]["measured"],
            "adapt_seconds": report["cost"]["seconds"],
            "version": report["version_after"],
            "digest": state.get("digest"),
        }

    def _options(self, repository: Repository, arm: Arm) -> dict[str, Any]:
        lead = next((each for each in self.schedule.arms if each.name == arm.follows), None)
        followed = self._lessons(repository, lead) if lead is not None else []
        return adapt_options(arm, followed, self.schedule.chunk_size, self.schedule.seed)

    def _lessons(self, repository: Repository, arm: Arm) -> list[Record]:
        return [
            record
            for record in self.results.records
            if record["record"] == "lesson"
            and (record["repository"], record["arm"]) == (repository.name, arm.name)
        ]

    def _restore(
        self, repository: Repository, arm: Arm, session: str, taught: Sequence[Lesson]
    ) -> None:
        """Bring the session to where the result file ends: as it is, or by teaching it again.

        A lesson that was cut off is in the session but not in the file; then all is taught again,
        also where it had updated nothing yet: its chunks count in the session's ledger, and the
        budget allows more after them.
        """
        state = self.client.session(session)
        lessons = self._lessons(repository, arm)
        if taught and state is not None:
            last, chunks = lessons[-1], sum(lesson["chunks"] for lesson in lessons)
            known = (last["version"], last["digest"], chunks)
            if (state["version"], state["digest"], state["chunks"]) == known:
                return
        self._forget(session)
        self.client.create_session(session)
        for lesson, before in zip(taught, lessons, strict=True):
            again = self._teach(repository, arm, lesson, session)
            if again["updates"] != before["updates"] or again["version"] != before["version"]:
                self.warn(
                    f"{repository.name}, {arm.name}: taught again, the session took "
                    f"{again['updates']} updates instead of {before['updates']}; is it the same "
                    "server with the same settings?"
                )

    def _forget(self, session: str) -> None:
        """Delete a session; a request that was cut off may hold it for a moment."""
        for attempt in range(_BUSY_SECONDS + 1):
            if self.client.session(session) is None:
                return
            try:
                self.client.delete_session(session)
            except ServerError as error:
                if error.status != 409 or attempt == _BUSY_SECONDS:
                    raise
                time.sleep(1.0)
            else:
                return


def _before(repository: Repository, subject: TextFile) -> list[TextFile]:
    """What a session has learned before the subject is asked about."""
    earlier = [each.file for each in repository.subjects]
    return [*repository.context, *earlier[: earlier.index(subject)]]


def _learned(chunk: Mapping[str, Any]) -> int:
    start, end = chunk["tokens"]
    return end - start if chunk["action"] != "SKIP" and "rollback" not in chunk else 0
