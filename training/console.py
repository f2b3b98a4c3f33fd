"""Running one command of `ponderttt train` as a module of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from ponderttt.errors import PonderError


def run(command: Callable[..., None]) -> None:
    """As `ponderttt` runs it: errors made on purpose are one line and exit code 2."""
    app = typer.Typer(pretty_exceptions_show_locals=False, add_completion=False)
    app.command()(command)
    try:
        app()
    except PonderError as error:
        typer.secho(f"error: {' '.join(str(error).split())}", fg="red", err=True)
        sys.exit(2)
