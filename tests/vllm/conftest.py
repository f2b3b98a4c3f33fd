"""A real vLLM server, our server in front of it, and our server by itself, all of one model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.live import Live, live_server
from tests.vllm.real_vllm import RealVllm

#: Half as many slots as the tests have sessions.
FLAGS = ("--enable-lora", "--max-loras", "4", "--max-lora-rank", "16")


@pytest.fixture(scope="session")
def vllm(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealVllm]:
    """vLLM with LoRA; tests may kill it, and start it again with FLAGS."""
    server = RealVllm(smollm2_dir, tmp_path_factory.mktemp("vllm") / "vllm.log")
    try:
        server.start(*FLAGS)
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def through_vllm(vllm: RealVllm, smollm2_dir: Path) -> Iterator[Live]:
    """Our server with engine `vllm`."""
    with live_server(smollm2_dir, engine="vllm", vllm_url=vllm.url, learning_rate=None) as live:
        yield live


@pytest.fixture(scope="session")
def by_ourselves(vllm: RealVllm, smollm2_dir: Path) -> Iterator[Live]:
    """Our server with engine `torch`, of the same context length."""
    with live_server(smollm2_dir, max_model_len=1024, learning_rate=None) as live:
        yield live
