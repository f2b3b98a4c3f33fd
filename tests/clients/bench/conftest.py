"""`ponderttt bench repo` against a fake server."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import clients.api
import clients.bench.statistics
from clients.bench.repo import repo
from tests.clients.bench.fake_server import FakeServer
from tests.helpers import source_text

SMALL = [
    "--files", "2", "--targets", "3", "--context-chars", "2500", "--file-chars", "800",
    "--left-chars", "300", "--unrelated-files", "1", "--budget", "1.5", "--budget", "2",
    "--seed", "3", "--quiet",
]  # fmt: skip
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files of code, in two directories."""
    root = tmp_path_factory.mktemp("repos") / "project"
    (root / "sub").mkdir(parents=True)
    lines = source_text().splitlines(keepends=True)
    starts = [i for i, line in enumerate(lines) if line.startswith(("def ", "class "))]
    for number in range(6):
        begin = starts[len(starts) * number // 6]
        end = starts[len(starts) * (number + 1) // 6] if number < 5 else len(lines)
        folder = root / "sub" if number % 2 else root
        (folder / f"part{number}.py").write_text("".join(lines[begin:end]))
    return root


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the command against a fake server."""
    real = clients.api.Client
    app = typer.Typer()
    app.command()(repo)

    # Intervals are tested elsewhere.
    monkeypatch.setattr(clients.bench.statistics, "RESAMPLES", 99)

    def invoke(server: FakeServer, *arguments: str, output: str = "r.jsonl") -> Any:
        monkeypatch.setattr(clients.api, "Client", partial(real, transport=server.transport))
        whole = [*SMALL, *arguments, "--output", str(tmp_path / output)]
        return CliRunner().invoke(app, whole, catch_exceptions=True)

    return invoke
