"""Asking and judging many problems at once; a finished one is on disk before it is counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from clients.answers import Completion
from clients.async_api import AsyncClient
from clients.bench.functional.ask import Asking, ask, completion_in
from clients.bench.functional.judge import Judgement, judge
from clients.bench.functional.problems import Problem, Suite
from clients.results import Record, ResultFile
from clients.sandbox import Limits, Sandbox
from clients.wire import ServerError
from ponderttt.errors import PonderError


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
    _judging: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, todo: Sequence[Unit], concurrency: int) -> None:
        """Ask `concurrency` units at once.

        After a failure nothing more is asked, but what has been asked is brought to an end. When
        cancelled, answers that are there are still judged and kept.

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
        if self._failure is not None:
            raise self._failure

    async def _work(self, queue: Iterator[Unit]) -> None:
        for unit in queue:
            if self._failure is not None:
                return
            try:
                answer = await ask(self.client, self.asking, self.suite, unit.problem, unit.sample)
                await asyncio.shield(self._kept(self._judge(unit, answer)))
            except PonderError as error:
                self._failure = self._failure or _located(unit, error)

    def _kept(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that is waited for even when this run is cancelled."""
        task = asyncio.create_task(work)
        self._judging.add(task)
        task.add_done_callback(self._judging.discard)
        return task

    async def _judge(self, unit: Unit, answer: Completion) -> None:
        completion = completion_in(self.suite, self.asking, answer.text)
        judgement = await asyncio.get_running_loop().run_in_executor(
            self.workers, judge, self.sandbox, self.limits, unit.problem, completion
        )
        record = make_record(unit, answer, completion, judgement)
        self.results.append(record)
        self.done(record)


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


def _located(unit: Unit, error: PonderError) -> PonderError:
    """The same error, saying at which problem."""
    if isinstance(error, ServerError) and error.status >= 400:
        return ServerError(error.status, f"{unit.problem.task_id}: {error}", error.retry_after)
    return error
