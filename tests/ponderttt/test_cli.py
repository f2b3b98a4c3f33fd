"""The root command and the sub-commands it finds."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from ponderttt import cli
from ponderttt.errors import ModelError

GROUP_APP = typer.Typer(no_args_is_help=True, help="A group of commands.")


@GROUP_APP.command("one")
def one() -> None:
    """The first."""
    typer.echo("one has run")


@GROUP_APP.command("two")
def two() -> None:
    """The second."""


def add(left: int, right: Annotated[int, typer.Option()] = 2) -> None:
    """Add two numbers."""
    typer.echo(left + right)


def refuse() -> None:
    """Always fails."""
    raise ModelError("no such\nmodel")


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points of a plug-in: a group, functions, and two that are broken."""
    plugin = types.ModuleType("ponderttt_test_plugin")
    vars(plugin).update(app=GROUP_APP, add=add, refuse=refuse, number=7)
    monkeypatch.setitem(sys.modules, "ponderttt_test_plugin", plugin)
    values = {
        "group": "ponderttt_test_plugin:app",
        "add": "ponderttt_test_plugin:add",
        "refuse": "ponderttt_test_plugin:refuse",
        "number": "ponderttt_test_plugin:number",
        "absent": "ponderttt_test_absent:app",
    }
    points = [EntryPoint(name, value, cli.GROUP) for name, value in values.items()]
    monkeypatch.setattr(cli, "entry_points", lambda *, group: points)


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """What the installed command does; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["ponderttt", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    code = caught.value.code
    assert isinstance(code, int)
    return code


def test_help_lists_every_command_the_broken_ones_too() -> None:
    result = CliRunner().invoke(cli.build_app(), ["--help"])
    assert result.exit_code == 0
    for word in ("group", "A group of commands.", "add", "Add two numbers.", "absent", "number"):
        assert word in result.stdout


def test_group_and_function_run() -> None:
    app = cli.build_app()
    assert CliRunner().invoke(app, ["group", "one"]).stdout == "one has run\n"
    assert CliRunner().invoke(app, ["add", "3", "--right", "4"]).stdout == "7\n"


def test_version_is_that_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    result = CliRunner().invoke(cli.build_app(), ["--version"])
    assert result.stdout == f"ponderttt {project['version']}\n"


def test_error_made_on_purpose_is_one_line_and_code_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("refuse", monkeypatch=monkeypatch) == 2
    assert capsys.readouterr() == ("", "error: no such model\n")


def test_error_on_a_terminal_is_red(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    run("refuse", monkeypatch=monkeypatch)
    assert capsys.readouterr().err == "\x1b[31merror: no such model\x1b[0m\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("absent", "--port", "1", "x"), "No module named 'ponderttt_test_absent'"),
        (("absent", "--help"), "No module named 'ponderttt_test_absent'"),
        (("number",), "neither a Typer nor a function"),
    ],
)
def test_broken_command_says_why_whatever_its_arguments(
    arguments: tuple[str, ...],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*arguments, monkeypatch=monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert reason in err


def test_command_modules_import_no_torch() -> None:
    code = (
        "import sys, ponderttt.cli, ponderttt.models.cli\n"
        "slow = {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(slow) if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
