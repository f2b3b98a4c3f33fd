"""A lab with the tiny Llama and small sizes; vLLM is never there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ponderttt.bench.lab import Lab, open_lab


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of the test's own: what is installed on this machine makes no difference."""
    monkeypatch.setenv("PONDERTTT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def lab(tiny_llama_dir: Path) -> Iterator[Lab]:
    """The tiny Llama, one thread."""
    with open_lab(str(tiny_llama_dir), threads=1, quick=True) as opened:
        yield opened
