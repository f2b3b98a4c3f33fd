"""The command `ponderttt`.

Sub-commands are found through the entry points `ponderttt.commands`, so that the core imports
none of the packages that provide them.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import Annotated

import typer

from ponderttt import __version__
from ponderttt.commands import mount
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
        mount(app, entry)
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
