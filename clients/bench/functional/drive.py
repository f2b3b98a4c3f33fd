"""Asking and judging many problems at once; a finished one is on disk before it is counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from clients import shapes
from clients.answers import LEARNED, Completion
from clients.async_api import AsyncClient
from clients.bench.functional.ask import Asking, RefusedError, ask, completion_in
from clients.bench.functional.judge import Judgement, judge
from clients.bench.functional.problems import Problem, Suite
from clients.results import Record, ResultFile
from clients.sandbox import Limits, Sandbox
from clients.wire import ServerError
from ponderttt.errors import PonderError

#: The verdict on an answer that the server refused to give.
REFUSED = "refused"
#: So many refusals before any answer are the settings' fault, not the problems'.
_MOST_REFUSED = 5


@dataclass(frozen=True, slots=True)
class Unit:
    """One answer to one problem."""

    problem: Problem
    sample: int

    @property
    def key(self) -> tuple[str, int]:
        """Names it in the result file."""
        return self.problem.task_id, self.sample


def units(suite: Suite, samples: int) -> list[Unit]:
    """All of them: first one sample of every problem, so that a score is there early."""
    return [Unit(problem, n) for n in range(samples) for problem in suite.problems]


@dataclass(slots=True)
class Drive:
    """Works units off.

    Args:
        client: of the endpoint.
        suite, asking: what is asked, and how.
        sandbox, limits: where programs run.
        workers: threads that run them.
        results: open; units that it has are not asked again.
        done: called with every new record.
    """

    client: AsyncClient
    suite: Suite
    asking: Asking
    sandbox: Sandbox
    limits: Limits
    workers: ThreadPoolExecutor
    results: ResultFile
    done: Callable[[Record], None]
    _failure: PonderError | None = None
    _answered: bool = False
    #: Kept back until an answer shows that the others could be answered.
    _refused: list[tuple[Unit, RefusedError]] = field(default_factory=list)
    _judging: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, todo: Sequence[Unit], concurrency: int) -> None:
        """Ask `concurrency` units at once.

        After a failure nothing more is asked, but what has been asked is brought to an end. When
        cancelled, answers that are there are still judged and kept. A problem that the server
        refuses is not passed, and is no failure of the run, unless nothing else is answered.

        Raises:
            PonderError: the endpoint fails, or the result file can't be written.
        """
        queue = iter([unit for unit in todo if unit.key not in self.results.done])
        asking = [asyncio.create_task(self._work(queue)) for _ in range(concurrency)]
        try:
            await asyncio.gather(*asking)
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, *self._judging, return_exceptions=True)
        if self._failure is None and self._refused:
            # Too few to tell; what was answered in an earlier run does.
            if any(record["verdict"] != REFUSED for record in self.results.records):
                self._keep_refused()
            else:
                self._failure = _located(*self._refused[0])
        if self._failure is not None:
            raise self._failure

    async def _work(self, queue: Iterator[Unit]) -> None:
        for unit in queue:
            if self._failure is not None:
                return
            try:
                await self._ask(unit)
            except PonderError as error:
                self._failure = self._failure or _located(unit, error)

    async def _ask(self, unit: Unit) -> None:
        try:
            answer = await ask(self.client, self.asking, self.suite, unit.problem, unit.sample)
        except RefusedError as error:
            self._refused.append((unit, error))
            if self._answered:
                self._keep_refused()
            elif len(self._refused) >= _MOST_REFUSED:
                raise
            return
        self._answered = True
        self._keep_refused()
        await asyncio.shield(self._kept(self._judge(unit, answer)))

    def _keep_refused(self) -> None:
        while self._refused:
            unit, error = self._refused.pop(0)
            self._keep(unit, refusal_record(unit, error))

    def _keep(self, unit: Unit, record: Record) -> None:
        # So that runs of other parts of the suite can be compared.
        record["problem_hash"] = unit.problem.fingerprint(base=self.asking.prompting == "base")
        self.results.append(record)
        self.done(record)

    def _kept(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that is waited for even when this run is cancelled."""
        task = asyncio.create_task(work)
        self._judging.add(task)
        task.add_done_callback(self._judging.discard)
        return task

    async def _judge(self, unit: Unit, answer: Completion) -> None:
        completion = completion_in(self.suite, self.asking, unit.problem, answer.text)
        judgement = await asyncio.get_running_loop().run_in_executor(
            self.workers, judge, self.sandbox, self.limits, unit.problem, completion
        )
        self._keep(unit, make_record(unit, answer, completion, judgement))


def make_record(
    unit: Unit, answer: Completion, completion: str, judgement: Judgement
) -> dict[str, Any]:
    """What the result file keeps of a unit."""
    cost: Mapping[str, Any] = (answer.ttt or {}).get("cost") or {}
    # A mean over no chunk, as with gate off, is none.
    cost = cost if cost.get("chunks") else {}
    passed = [name for name, verdict in judgement.verdicts.items() if verdict == "passed"]
    several = len(judgement.verdicts) > 1
    return {
        "task_id": unit.problem.task_id,
        "sample": unit.sample,
        "passed": judgement.passed,
        "result": judgement.result,
        "checks_passed": len(passed) / len(judgement.verdicts),
        "verdict": next((v.value for v in judgement.verdicts.values() if v != "passed"), "passed"),
        "checks": {n: v.value for n, v in judgement.verdicts.items()} if several else None,
        "completion": completion,
        "answer": answer.text,
        "finish_reason": answer.choices[0].finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "seconds": answer.seconds,
        "run_seconds": judgement.seconds,
        "ran_again": judgement.ran_again,
        "nominal": cost.get("nominal"),
        "measured": cost.get("measured"),
        "ttt_seconds": cost.get("seconds"),
        "ttt": answer.ttt,
    }


def record_check(suite: Suite) -> shapes.Check:
    """What reports read of a record of this suite."""
    tasks = {problem.task_id for problem in suite.problems}
    counted = ("prompt_tokens", "completion_tokens", "seconds")
    return shapes.fields(
        {
            "task_id": shapes.scalar(f"a problem of this {suite.name}", tasks.__contains__),
            "sample": shapes.count,
            "passed": shapes.boolean,
            "result": shapes.text,
            "verdict": shapes.text,
            "checks": shapes.or_null(shapes.fields({})),
            "completion": shapes.text,
            "finish_reason": shapes.or_null(shapes.text),
            **dict.fromkeys(counted, shapes.or_null(shapes.number)),
            "run_seconds": shapes.number,
            "ttt": shapes.or_null(LEARNED),
        },
        # Files of earlier versions have none.
        {"ran_again": shapes.count},
    )


def refusal_record(unit: Unit, error: RefusedError) -> dict[str, Any]:
    """What the result file keeps of a unit that the server refused: not passed, and the reason."""
    checks = unit.problem.checks
    return {
        "task_id": unit.problem.task_id,
        "sample": unit.sample,
        "passed": False,
        "result": f"failed: refused by the server: {error}",
        "checks_passed": 0.0,
        "verdict": REFUSED,
        "checks": dict.fromkeys(checks, REFUSED) if len(checks) > 1 else None,
        "completion": "",
        "answer": None,
        "finish_reason": None,
        "prompt_tokens": None,
        "completion_tokens": None,
        "seconds": None,
        "run_seconds": 0.0,
        "ran_again": 0,
        "nominal": None,
        "measured": None,
        "ttt_seconds": None,
        "ttt": None,
    }


def _located(unit: Unit, error: PonderError) -> PonderError:
    """The same error, saying at which problem."""
    if isinstance(error, ServerError) and error.status >= 400:
        return ServerError(error.status, f"{unit.problem.task_id}: {error}", error.retry_after)
    return error
