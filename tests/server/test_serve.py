"""The command `ponderttt serve`, as a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import typer
from typer.testing import CliRunner

from ponderttt.errors import InvalidRequestError, PonderError
from server.cli import _warn_of_shorter_context, serve
from server.runner import base_url, bind
from server.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parents[2]
# The command without the entry point, so that the tests run before the package is installed.
COMMAND = "import typer\nfrom server.cli import serve\ntyper.run(serve)"


@pytest.fixture
def app() -> typer.Typer:
    """The command alone."""
    command = typer.Typer()
    command.command()(serve)
    return command


@pytest.fixture(scope="module")
def process(tiny_llama_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """`ponderttt serve` with the tiny model on a free port."""
    options = ["--model", str(tiny_llama_dir), "--port", "0", "--no-measure-costs",
               "--log-level", "warning", "--drain-seconds", "30", "--threads", "1"]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PONDERTTT_BUDGET": "3.5"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as running:
        yield running
        running.kill()


def banner(process: subprocess.Popen[str]) -> str:
    """What the server prints when it is ready."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("    -d"):
            break
    return "".join(lines)


def test_longer_context_than_the_model_has_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_shorter_context(None, 512)
    _warn_of_shorter_context(512, 512)
    assert not caplog.records
    _warn_of_shorter_context(4096, 512)
    assert len(caplog.messages) == 1
    assert "4096" in caplog.text
    assert "512 tokens" in caplog.text


def test_sigterm_lets_a_stream_finish_and_refuses_new_requests(
    process: subprocess.Popen[str],
) -> None:
    said = banner(process)
    url = re.search(r"serves tiny-llama\S* at (http://\S+)", said)
    assert url is not None, said
    assert "gate threshold · budget 3.5" in said
    assert "curl http://" in said
    with httpx.Client(base_url=url[1], timeout=30) as client:
        assert client.get("/ready").status_code == 200
        body = {
            "prompt": "def f(x):", "max_tokens": 500, "ignore_eos": True, "stream": True,
            "ttt": {"gate": "off"}, "logprobs": 20,
        }  # fmt: skip
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            received = [next(lines)]
            process.send_signal(signal.SIGTERM)
            refused = _until_refused(client)
            received += [line for line in lines if line]
    assert "shutting down" in refused["error"]["message"]
    assert received[-1] == "data: [DONE]"
    last = json.loads(received[-2].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] == "length"
    assert process.wait(timeout=20) == 0


def _until_refused(client: httpx.Client) -> dict[str, dict[str, str]]:
    """The answer to a new request while the server drains; it stays alive meanwhile."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 0})
        if answer.status_code == 503:
            assert client.get("/ready").status_code == 503
            assert client.get("/health").status_code == 200
            refusal: dict[str, dict[str, str]] = answer.json()
            return refusal
        assert answer.status_code == 200
    raise AssertionError("new requests were not refused")


def test_help_names_every_setting_its_default_and_its_variable(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert result.exit_code == 0
    text = re.sub(r"\s+", " ", result.output.replace("│", " "))
    assert "--config" in text
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        assert f"[env var: {ENV_PREFIX}{name.upper()}]" in text
        if field.default is not None and field.annotation is not bool:
            assert f"[default: {field.default}]" in text, name


@pytest.mark.parametrize(
    ("options", "tells"),
    [
        (["--budget", "0.5"], "greater than or equal to 1"),
        (["--engine", "vllm", "--port", "0"], "give it with --vllm-url"),
        (["--engine", "vllm", "--port", "0", "--vllm-url", "http://127.0.0.1:9"], "--enable-lora"),
        (["--model", "/no/such/model", "--port", "0"], "there is no /no/such/model"),
        (["--host", "192.0.2.1"], "can't listen on 192.0.2.1"),
        (["--config", "/no/such.toml"], "can't be read"),
        (["--host", "0.0.0.0", "--port", "0"], "--allow-unauthenticated"),
        (["--api-key-file", "/no/such.toml", "--port", "0"], "/no/such.toml can't be read"),
    ],
)
def test_serve_that_can_not_start_says_why(
    app: typer.Typer, options: list[str], tells: str
) -> None:
    result = CliRunner().invoke(app, options)
    assert isinstance(result.exception, PonderError)
    assert tells in str(result.exception)


def test_serve_with_an_option_over_the_file_uses_it(app: typer.Typer, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("budget = 0.25\nchunk_size = 1\n")
    result = CliRunner().invoke(app, ["--config", str(path), "--budget", "2"])
    # The file's budget is overruled; its chunk size is what is wrong now.
    assert isinstance(result.exception, InvalidRequestError)
    assert result.exception.param == "chunk_size"


def test_taken_port_is_told_with_a_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PonderError, match=f"port {port}.*--port"):
            bind("127.0.0.1", port)


def test_base_url_is_one_that_a_client_can_use() -> None:
    with bind("0.0.0.0", 0) as sock:
        assert base_url(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"


def test_commands_are_found_through_their_entry_points() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    commands = project["entry-points"]["ponderttt.commands"]
    assert commands["serve"] == "server.cli:serve"
    assert commands["keys"] == "server.keys_cli:app"
    assert commands["adapt"] == "clients.adapt:adapt"


def test_importing_the_commands_does_not_import_torch() -> None:
    code = (
        "import sys, server.cli, server.keys_cli, clients.adapt; sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0
