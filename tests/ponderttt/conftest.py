"""How the tests of the core library run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small matrices gain nothing from threads, which on busy cores only wait for each other.

    Measured on two cores that others used as well: 10 to 20 times slower with two threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def one_thread_for_tiny_models(request: pytest.FixtureRequest) -> None:
    """Tests of the embedded models keep the threads they find."""
    if request.node.get_closest_marker("real_model") is None:
        request.getfixturevalue("one_thread")
