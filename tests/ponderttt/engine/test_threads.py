"""Only the engine's thread computes in parallel."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from ponderttt.engine.threads import ThreadShare, run_apart


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_job_apart_runs_in_another_thread_and_gives_its_result() -> None:
    assert run_apart(threading.get_ident) != threading.get_ident()


def test_error_of_a_job_apart_comes_through() -> None:
    def fail() -> None:
        raise ValueError("as it was")

    with pytest.raises(ValueError, match="as it was"):
        run_apart(fail)


def test_thread_that_takes_the_share_keeps_it_and_later_ones_compute_alone() -> None:
    torch.set_num_threads(2)
    share = ThreadShare()
    seen: list[int] = []

    def engine() -> None:
        share.take()
        seen.append(run_apart(torch.get_num_threads))
        # Asked for last: computing must not have taken it back.
        (torch.ones(512, 512) @ torch.ones(512, 512)).sum()
        seen.append(torch.get_num_threads())

    run_apart(engine)
    assert seen == [1, 2]
    assert torch.get_num_threads() == 2
