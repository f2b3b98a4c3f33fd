"""`ponderttt bench humaneval` where the server is busy or wrong, or the result file is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner, Result

import clients.bench.functional.run
import clients.sandbox
from clients.api import Client
from clients.async_api import AsyncClient
from clients.bench.functional.cli import humaneval
from clients.bench.functional.humaneval import load_humaneval
from clients.bench.functional.problems import Suite
from clients.results import read_results
from ponderttt.errors import PonderError
from tests.clients.bench.functional.fake_coder import FakeCoder, FakeSandbox

Run = Callable[..., Result]


class BusyCoder(FakeCoder):
    """Too busy to name its models; how often it was asked is in `log`."""

    def answer(self, request: httpx.Request) -> httpx.Response:
        """Anything but completions."""
        self.log.append(request.url.path)
        return busy()


def busy() -> httpx.Response:
    """The server is full."""
    headers = {"Retry-After": "32"}
    return httpx.Response(429, json={"error": {"message": "queue full"}}, headers=headers)


@pytest.fixture(scope="module")
def suite() -> Suite:
    """The first three problems."""
    return load_humaneval(None).only(None, 3)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the command against a fake server; waits take no time."""

    async def no_wait(seconds: float) -> None:
        del seconds

    app, module = typer.Typer(), clients.bench.functional.run
    app.command()(humaneval)
    monkeypatch.setattr(clients.sandbox, "open_sandbox", lambda **_: FakeSandbox())
    monkeypatch.setattr("clients.api.time.sleep", lambda seconds: None)
    monkeypatch.setattr("clients.async_api.asyncio.sleep", no_wait)

    def invoke(server: FakeCoder, *arguments: str) -> Result:
        monkeypatch.setattr(module, "Client", partial(Client, transport=server.transport))
        monkeypatch.setattr(module, "AsyncClient", partial(AsyncClient, transport=server.transport))
        options = ["--limit", "3", "--concurrency", "1", "--output", str(tmp_path / "r.jsonl")]
        return CliRunner().invoke(app, [*options, *arguments])

    return invoke


def change(path: Path, number: int, **fields: Any) -> None:
    """Change fields of a record, from 0; a field that is ... is taken out."""
    lines = path.read_text().splitlines()
    record = json.loads(lines[number + 1]) | fields
    kept = {name: value for name, value in record.items() if value is not ...}
    lines[number + 1] = json.dumps(kept)
    path.write_text("\n".join(lines) + "\n")


def test_waits_for_a_busy_server_are_shown_on_the_bar(run: Run, suite: Suite) -> None:
    result = run(FakeCoder(suite, refusals=[busy(), busy()]), "--retries", "6")
    assert result.exit_code == 0, result.output
    assert "the server is busy (429), asking again in 32 s, 2 of 6" in result.stderr
    # The bar goes on as before.
    last = result.stderr.splitlines()[-1]
    assert "passed 3/3" in last
    assert "busy" not in last
    quiet = run(FakeCoder(suite, refusals=[busy()]), "--quiet", "--fresh")
    assert "busy" not in quiet.stderr


def test_retries_are_those_of_the_command_line(run: Run, suite: Suite) -> None:
    server = FakeCoder(suite, refusals=[busy() for _ in range(9)])
    result = run(server, "--retries", "3")
    assert isinstance(result.exception, PonderError)
    assert "queue full (tried 4 times)" in str(result.exception)
    assert len(server.refusals) == 5
    assert run(FakeCoder(suite, refusals=[busy()]), "--retries", "0").exit_code != 0


def test_server_that_is_busy_before_the_run_is_asked_a_few_times_and_that_is_said(
    run: Run, suite: Suite, tmp_path: Path
) -> None:
    server = BusyCoder(suite)
    result = run(server)
    assert isinstance(result.exception, PonderError)
    assert server.log == ["/v1/models"] * 3
    assert result.stderr.count("the server is busy (429), asking again in 32 s") == 2
    assert run(BusyCoder(suite), "--quiet").stderr == ""
    # What was given holds before the run, too.
    for given in ("1", "4"):
        patient = BusyCoder(suite)
        run(patient, "--retries", given)
        assert len(patient.log) == int(given) + 1
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"usage": {"prompt_tokens": "10"}}, "usage.prompt_tokens is '10', not a number"),
        ({"ttt": {}}, "ttt.gate is missing"),
        ({"ttt": {"cost": {"chunks": "x"}}}, "ttt.gate is missing"),
        ({"choices": None, "error": {"message": "model exploded"}}, "model exploded"),
    ],
)
def test_answer_of_a_wrong_form_ends_the_run_and_a_later_one_goes_on(
    run: Run, suite: Suite, tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    def alter(reply: dict[str, Any]) -> None:
        if len(server.asked) == 2:
            reply.update(fields)

    server = FakeCoder(suite, alter=alter)
    result = run(server)
    assert isinstance(result.exception, PonderError)
    assert told in str(result.exception)
    assert "1 of 3 answers are in" in str(result.exception)
    assert run(FakeCoder(suite)).exit_code == 0
    assert len(read_results(tmp_path / "r.jsonl")[1]) == 3


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"passed": ...}, "passed is missing"),
        ({"passed": 2}, "passed is 2, not true or false"),
        ({"seconds": "x"}, "seconds is 'x', not a number"),
        ({"verdict": None}, "verdict is None, not a text"),
        ({"ttt": {}}, "ttt.gate is missing"),
        ({"task_id": "HumanEval/99"}, "task_id is 'HumanEval/99', not a problem of this humaneval"),
    ],
)
def test_damaged_record_is_named_and_asked_again_once_it_is_removed(
    run: Run, suite: Suite, tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    path = tmp_path / "r.jsonl"
    assert run(FakeCoder(suite)).exit_code == 0
    change(path, 1, **fields)
    result = run(FakeCoder(suite))
    assert isinstance(result.exception, PonderError)
    assert f"r.jsonl is damaged, line 3: {told}" in str(result.exception)
    assert "mend or remove the line" in str(result.exception)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], *lines[3:]]))
    again = FakeCoder(suite)
    assert run(again).exit_code == 0
    assert len(again.asked) == 1
