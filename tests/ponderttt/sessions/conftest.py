"""Stores that several servers may open."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ponderttt.sessions import stores
from tests.ponderttt.sessions.servers import Place
from tests.ponderttt.sessions.stores import FaultyFiles


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tiny_llama_dir: Path, tmp_path: Path) -> Place:
    """On local disk, and on another file system of fsspec."""
    url = str(tmp_path / "store") if request.param == "local" else stores.memory_url()
    return Place(tiny_llama_dir, url)


@pytest.fixture
def faulty(tiny_llama_dir: Path, tmp_path: Path) -> Place:
    """On local disk, with faults that can be switched on."""
    return Place(tiny_llama_dir, str(tmp_path), FaultyFiles(tmp_path))
