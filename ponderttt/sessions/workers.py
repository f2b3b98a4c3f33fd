"""Threads that wait for the store, so that the engine need not."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Workers:
    """A few threads that run functions in the order in which they come.

    Unlike an executor's they don't keep a process alive whose store hangs.

    Args:
        count: threads; started with the first job.
        name: of the threads.
    """

    def __init__(self, count: int, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True)
            for i in range(count)
        ]
        self._guard = threading.Lock()
        self._started = False

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function in one of the threads."""
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)

        with self._guard:
            if not self._started:
                self._started = True
                for thread in self._threads:
                    thread.start()
        self._jobs.put(job)
        return future

    def close(self) -> None:
        """End the threads once what was submitted is done; does not wait."""
        for _ in self._threads:
            self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
