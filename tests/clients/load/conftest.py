"""The command line of `ponderttt bench load`, without a network."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import httpx
import pytest
import typer
from typer.testing import CliRunner, Result

import clients.load.run
from clients.api import Client
from clients.async_api import AsyncClient
from clients.load.cli import load
from tests.clients.load.plain import Plain, Run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """The command against an endpoint."""
    app = typer.Typer()
    app.command()(load)

    def invoke(server: Plain, *arguments: str, quiet: bool = True) -> Result:
        module = clients.load.run
        short, long = httpx.MockTransport(server.sync), httpx.MockTransport(server.completion)
        monkeypatch.setattr(module, "Client", partial(Client, transport=short))
        monkeypatch.setattr(module, "AsyncClient", partial(AsyncClient, transport=long))
        output = ["--output", str(tmp_path / "load.jsonl")]
        silent = ["--quiet"] if quiet else []
        return CliRunner().invoke(app, [*silent, *output, *arguments])

    return invoke
