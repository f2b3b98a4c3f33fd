"""Servers shared by the tests of this directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.live import Live, live_server


@pytest.fixture(scope="session")
def live(tiny_llama_dir: Path) -> Iterator[Live]:
    """A server of the tiny Llama: context 512, no fill-in-the-middle tokens."""
    with live_server(tiny_llama_dir) as server:
        yield server


@pytest.fixture(scope="session")
def live_coder(tiny_qwen2_dir: Path) -> Iterator[Live]:
    """A server of the tiny Qwen2, which has fill-in-the-middle tokens."""
    with live_server(tiny_qwen2_dir) as server:
        yield server
