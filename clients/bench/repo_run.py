"""Running the repository benchmark: every step's result is on disk before the next begins."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clients.answers import LESSON_CHUNK, LESSON_REPORT, field_of
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
from clients.events import progress_of
from clients.files import TextFile
from clients.results import Key, Record, ResultFile
from ponderttt.errors import PonderError

if TYPE_CHECKING:
    from clients.api import Client

# Chunks that no gate could have learned.
_INELIGIBLE = ("short", "seen")
_BUSY_SECONDS = 60
#: Kind of the records of sessions that became others when they were taught again; no steps.
RETAUGHT = "retaught"


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
        learning: called as a lesson goes on: repository and arm, what is done, of how much.
        warn: called with what a user should know.
        exam: taken in each session that has learned under a budget; None: none.
    """

    client: Client
    asking: Asking
    schedule: Schedule
    results: ResultFile
    stuffing: Stuffing | None
    done: Callable[[Record], None]
    learning: Callable[[str, float, float], None]
    warn: Callable[[str], None]
    exam: Exam | None = None
    _prefixes: dict[tuple[str, str], str] = field(default_factory=dict)

    def run(self) -> None:
        """All that is left to do.

        Raises:
            PonderError: the server fails, and the same call goes on later; or the result file lacks
                a step on which later ones depend.
        """
        for repository in self.schedule.plan.repositories:
            for arm in self.schedule.arms:
                self._check_order(repository, arm)
        if self.exam is not None:
            self.exam.take("off", None)
        for repository in self.schedule.plan.repositories:
            for arm in self.schedule.arms:
                self._run_arm(repository, arm)

    def _check_order(self, repository: Repository, arm: Arm) -> None:
        """Refuse a file in which a step is missing before others of the same session.

        Such a step can't be made up for: the session has learned what came after it.
        """
        if not arm.learns:
            return
        every = list(steps(self.schedule.plan, repository, arm))
        left = [step.unit for step in every if not self._is_done(repository, arm, step)]
        if left and left != [step.unit for step in every[-len(left) :]]:
            raise PonderError(
                f"{self.results.path} lacks {left[0]!r} of repository {repository.name}, arm "
                f"{arm.name}, but has later steps of the same session, which can't be undone; "
                "remove all later lines of this repository and arm as well, then run it again"
            )

    def _is_done(self, repository: Repository, arm: Arm, step: Step) -> bool:
        key: Key = (repository.name, arm.name, step.unit)
        return key in self.results.done

    def _run_arm(self, repository: Repository, arm: Arm) -> None:
        every = list(steps(self.schedule.plan, repository, arm))
        left = [step for step in every if not self._is_done(repository, arm, step)]
        session = None
        examined = f"{repository.name}-{arm.name}" if arm.kind == "adapt" else None
        due = examined is not None and self._is_exam_due(repository, arm, examined)
        if arm.learns:
            session = self.schedule.session(repository, arm)
            if left or due or self.schedule.keep_sessions:
                done = every[: len(every) - len(left)]
                taught = [step for step in done if isinstance(step, Lesson)]
                self._restore(repository, arm, session, taught)
        for step in left:
            record = {"repository": repository.name, "arm": arm.name, "unit": step.unit}
            record |= self._do(repository, arm, step, session)
            self.results.append(record)
            self.done(record)
        if self.exam is not None and examined is not None and due:
            states = self._states(repository, arm)
            self.exam.take(examined, session, states[-1]["digest"] if states else None)
        if session is not None and not self.schedule.keep_sessions:
            self._forget(session)

    def _is_exam_due(self, repository: Repository, arm: Arm, title: str) -> bool:
        # Finished is finished, also where the session was another one before it was taught again.
        digests = [state["digest"] for state in self._states(repository, arm)]
        exam = self.exam
        return exam is not None and all(exam.is_due(title, digest) for digest in digests)

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
        lessons, states = self._lessons(repository, arm), self._states(repository, arm)
        return {
            "file": subject.file.path,
            "kind": target.kind,
            "learned_tokens": sum(lesson["learned_tokens"] for lesson in lessons),
            "version": states[-1]["version"] if states else 0,
            **ask(self.client, self.asking, subject.file, target, stuffing, session),
        }

    def _read(self, file: TextFile, session: str | None) -> dict[str, Any]:
        loss = measure_loss(self.client, self.asking, "", file.text, session)
        return {"unrelated_loss": loss.per_token, "unrelated_tokens": loss.tokens}

    def _teach(
        self, repository: Repository, arm: Arm, lesson: Lesson, session: str
    ) -> dict[str, Any]:
        options = self._options(repository, arm)
        documents = [{"path": file.path, "text": file.text} for file in lesson.files]
        chunks: list[Mapping[str, Any]] = []
        report: Mapping[str, Any] = {}
        for event in self.client.adapt(session, documents, options):
            if event["object"] == LESSON_REPORT:
                report = event
            if event["object"] != LESSON_CHUNK:
                continue
            chunks.append(event)
            if (told := progress_of(event)) is not None:
                self.learning(f"{repository.name} {arm.name}", *told)
        state = self.client.session(session) or {}
        return {
            "options": options,
            "gate": report["gate"],
            "files": [file.path for file in lesson.files],
            "tokens": report["tokens"],
            "chunks": len(chunks),
            "eligible": sum(chunk["reason"] not in _INELIGIBLE for chunk in chunks),
            "updates": sum(chunk["action"] != "SKIP" for chunk in chunks),
            "actions": dict(Counter(chunk["action"] for chunk in chunks)),
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
        return self._records(repository, arm, "lesson")

    def _states(self, repository: Repository, arm: Arm) -> list[Record]:
        """Records of the last lesson and of each time since that the session was taught again."""
        found = self._records(repository, arm, "lesson", RETAUGHT)
        lessons = [place for place, each in enumerate(found) if each["record"] == "lesson"]
        return found[lessons[-1] :] if lessons else []

    def _records(self, repository: Repository, arm: Arm, *kinds: str) -> list[Record]:
        return [
            record
            for record in self.results.records
            if record["record"] in kinds
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
        lessons, states = self._lessons(repository, arm), self._states(repository, arm)
        if taught and state is not None:
            known = (*_identity(states[-1]), sum(lesson["chunks"] for lesson in lessons))
            if (*_identity(state), field_of(state, "chunks", int)) == known:
                return
        self._forget(session)
        self.client.create_session(session)
        again = [self._teach(repository, arm, lesson, session) for lesson in taught]
        if again and _identity(again[-1]) != _identity(states[-1]):
            self._note_retaught(repository, arm, lessons, again)

    def _note_retaught(
        self,
        repository: Repository,
        arm: Arm,
        lessons: Sequence[Mapping[str, Any]],
        again: Sequence[Mapping[str, Any]],
    ) -> None:
        updates = sum(lesson["updates"] for lesson in again)
        self.warn(
            f"{repository.name}, {arm.name}: taught again, the session is not what it was "
            f"({updates} updates, before {sum(lesson['updates'] for lesson in lessons)}); is it "
            "the same server with the same settings and threads?"
        )
        number = len(self._records(repository, arm, RETAUGHT))
        self.results.append({
            "repository": repository.name,
            "arm": arm.name,
            "unit": f"{RETAUGHT} {number}",
            "record": RETAUGHT,
            "updates": updates,
            "version": again[-1]["version"],
            "digest": again[-1]["digest"],
        })  # fmt: skip

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


def _identity(state: Mapping[str, Any]) -> tuple[Any, Any]:
    """Of a session's weights; the server's own words are checked, as records have been."""
    return field_of(state, "version", int), state.get("digest")


def _before(repository: Repository, subject: TextFile) -> list[TextFile]:
    """What a session has learned before the subject is asked about."""
    earlier = [each.file for each in repository.subjects]
    return [*repository.context, *earlier[: earlier.index(subject)]]


def _learned(chunk: Mapping[str, Any]) -> int:
    start, end = chunk["tokens"]
    return end - start if chunk["action"] != "SKIP" and "rollback" not in chunk else 0
