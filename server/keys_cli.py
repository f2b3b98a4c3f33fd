"""`ponderttt keys`: make API keys."""

from __future__ import annotations

import json
from typing import Annotated, get_args

import typer

from ponderttt.errors import InvalidRequestError
from ponderttt.sessions.names import check_key_id
from server.keys import Scope, digest_of, new_key

app = typer.Typer(no_args_is_help=True, help="Make API keys for `ponderttt serve --api-key-file`.")


@app.callback()
def _keys() -> None:
    """Make API keys for `ponderttt serve --api-key-file`."""


@app.command()
def new(
    key_id: Annotated[
        str, typer.Option("--id", help="Who it is for: 1 to 32 of a-z, 0-9, '_' and '-'.")
    ],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="completions (default): the API, with sessions of their own; metrics: /metrics; "
            "admin: everything, and everybody's sessions. May be repeated."
        ),
    ] = None,
    max_sessions: Annotated[
        int | None, typer.Option(help="Sessions of this key at most.", min=0)
    ] = None,
    max_waiting: Annotated[
        int | None, typer.Option(help="Requests of this key that may wait.", min=1)
    ] = None,
) -> None:
    """Print a fresh key, once, and what belongs in the key file.

    The key goes to the standard error and the entry to the standard output, so that
    `ponderttt keys new --id alice >> keys.toml` does the rest; a running server notices.
    """
    check_key_id("--id", key_id)
    scopes = list(dict.fromkeys(scope or ["completions"]))
    for each in scopes:
        if each not in get_args(Scope):
            raise InvalidRequestError(
                "--scope", f"{each!r} is not one of {', '.join(get_args(Scope))}"
            )
    key = new_key()
    typer.echo(f"{key}\nThe key of {key_id}. It is shown only now: keep it safe.", err=True)
    lines = [
        f"\n[keys.{key_id}]",
        f'sha256 = "{digest_of(key.encode()).hex()}"',
        f"scopes = {json.dumps(scopes)}",
    ]
    if max_sessions is not None:
        lines.append(f"max_sessions = {max_sessions}")
    if max_waiting is not None:
        lines.append(f"max_waiting = {max_waiting}")
    typer.echo("\n".join(lines))
