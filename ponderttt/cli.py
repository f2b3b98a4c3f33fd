"""The command `ponderttt`.

Sub-commands are found through the entry points `ponderttt.commands`, so that the core imports
none of the packages that provide them. Each entry is a `typer.Typer` to mount or a function to
register. One that can't be loaded fails when it is called and leaves the others alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated

import typer

from ponderttt import __version__
from ponderttt.errors import PonderError

GROUP = "ponderttt.commands"


def build_app() -> typer.Typer:
    """The root command with every sub-command that is installed."""
    app = typer.Typer(
        name="ponderttt",
        no_args_is_help=True,
        # A traceback with local variables could print API keys.
        pretty_exceptions_show_locals=False,
        help="Code completion that learns your code while it serves it.",
    )
    app.callback()(_root)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        _mount(app, entry)
    return app


def main() -> None:
    """Run the command line; errors made on purpose are one red line and exit code 2."""
    try:
        build_app()()
    except PonderError as error:
        from rich.console import Console
        from rich.text import Text

        line = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(Text(f"error: {line}", style="red"))
        sys.exit(2)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ponderttt {__version__}")
        raise typer.Exit


def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Code completion that learns your code while it serves it."""


def _mount(app: typer.Typer, entry: EntryPoint) -> None:
    try:
        command = entry.load()
    # Whatever a foreign module raises on import is that command's trouble alone.
    except Exception as error:
        _mount_broken(app, entry, f"{type(error).__name__}: {error}", error)
        return
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=entry.name)
    elif callable(command):
        app.command(entry.name)(command)
    else:
        _mount_broken(app, entry, f"{entry.value} is neither a Typer nor a function", None)


def _mount_broken(
    app: typer.Typer, entry: EntryPoint, reason: str, cause: Exception | None
) -> None:
    """Register a command that says why it can't run, whatever its arguments."""

    def fail() -> None:
        raise PonderError(
            f"the command {entry.name!r} ({entry.value}) can't be loaded: {reason}. Set "
            "ponderttt up again, or remove the package that brings the command"
        ) from cause

    lenient = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    register: Callable[[Callable[[], None]], object] = app.command(
        entry.name, help="(can't be loaded; call it to see why)", context_settings=lenient
    )
    register(fail)
