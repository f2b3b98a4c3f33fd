"""Commands from entry points: each is a `typer.Typer` to mount or a function to register.

One that can't be loaded fails when it is called and leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint

import typer

from ponderttt.errors import PonderError


def mount(app: typer.Typer, entry: EntryPoint) -> None:
    """Add the command that an entry point names, or one that says why it can't run."""
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
