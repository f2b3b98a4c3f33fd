"""`ponderttt bench`: its sub-commands are the entry points `ponderttt.bench_commands`.

So the clients can add benchmarks of a server without the core importing them.
"""

from __future__ import annotations

from importlib.metadata import entry_points

import typer

from ponderttt.commands import mount

GROUP = "ponderttt.bench_commands"


def build_group() -> typer.Typer:
    """The group with every benchmark that is installed."""
    group = typer.Typer(no_args_is_help=True, help="Measure the engine and what it is good for.")
    # With a callback one command remains a sub-command of the group.
    group.callback()(_nothing)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        mount(group, entry)
    return group


def _nothing() -> None:
    """Measure the engine and what it is good for."""


app = build_group()
