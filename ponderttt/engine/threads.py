"""Which threads compute.

OpenMP keeps a pool of threads for every thread that ever computed in parallel. Once the pools of a
process have more threads than the machine has cores, libgomp no longer lets them spin but puts them
to sleep at each barrier, of which one token passes thousands: decoding 16 sequences took 1.3 times
as long. So only the engine's thread may have a pool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def run_apart(job: Callable[[], T]) -> T:
    """Run something in a thread of its own: its pool ends with it.

    Raises:
        BaseException: what the job raised.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(job())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="apart", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


class ThreadShare:
    """Leaves all of PyTorch's threads to one thread of the process.

    Made anywhere, it remembers how many there are; `take` gives them to the thread that calls it.
    Threads that compute for the first time afterwards do so alone.
    """

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()

    def take(self) -> None:
        """Compute with all threads from now on; the others, that begin later, with one each."""
        # A thread that asks has its number from then on; else it would yet get the one set last.
        torch.get_num_threads()
        torch.set_num_threads(self._threads)
        # Threads to come start from what was set last; this one has its own number by now.
        alone = threading.Thread(target=torch.set_num_threads, args=(1,))
        alone.start()
        alone.join()
