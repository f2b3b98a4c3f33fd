"""`ponderttt models`: which models there are, and fetching one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="List and fetch models.")

# Parameters and licence of the hub models that have a short name.
_SCALES = {"125m": (124_439_808, "MIT"), "350m": (354_823_168, "MIT"), "1b": (774_030_080, "MIT")}
_PIPE_WIDTH = 300


@app.command("list")
def list_models() -> None:
    """Show the models that have a short name: size, licence, and whether they are here."""
    from rich.console import Console
    from rich.table import Table

    from ponderttt.models import hub, store
    from ponderttt.models.embedded import EMBEDDED

    table = Table("name", "parameters", "licence", "installed", "size")
    table.add_column("path", overflow="fold")
    for model in EMBEDDED.values():
        found = store.installed(model)
        _add(table, model.name, model.parameters, model.licence, found)
    for name, (parameters, licence) in _SCALES.items():
        repository = store.ALIASES[name]
        found = hub.cached_model(repository)
        _add(table, f"{name} ({repository})", parameters, licence, found)
    # A pipe has no width: nothing may be cut off there.
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)


@app.command("fetch")
def fetch(
    name: Annotated[
        str, typer.Argument(help="An embedded model, a scale (125m, 350m, 1b) or a hub name.")
    ],
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Show no progress.", envvar="PONDERTTT_QUIET")
    ] = False,
) -> None:
    """Fetch a model, verify and convert it; prints its directory. Safe to interrupt and repeat."""
    from ponderttt.models import store

    typer.echo(store.resolve(name, progress=not quiet))


def _add(table: Table, name: str, parameters: int, licence: str, found: Path | None) -> None:
    size = f"{_bytes_in(found) / 1e9:.2f} GB" if found else "-"
    where = str(found) if found else f"ponderttt models fetch {name.split()[0]}"
    table.add_row(name, f"{parameters / 1e6:.0f} M", licence, "yes" if found else "no", size, where)


def _bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
