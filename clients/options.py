"""What several commands do alike with their options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ponderttt.errors import InvalidRequestError, PonderError

if TYPE_CHECKING:
    from clients.api import Client


def choose_model(client: Client, wanted: str | None) -> str:
    """The model that was asked for, which has to be served; else the first that the server names.

    Raises:
        InvalidRequestError: the server has no such model.
        PonderError: it serves nothing, or fails.
    """
    served = client.models()
    if not served:
        raise PonderError(f"{client.base_url} serves no model")
    if wanted is not None and wanted not in served:
        raise InvalidRequestError("--model", f"{wanted!r} isn't served; give {', '.join(served)}")
    return wanted if wanted is not None else served[0]


def check_writable(option: str, path: Path | None) -> None:
    """See that a file can be written later, before the work whose result it would lose.

    Args:
        option: that names the file.
        path: None: nothing is to be written.
    Raises:
        InvalidRequestError: its directory is missing or can't be written to.
    """
    if path is not None and not os.access(path.absolute().parent, os.W_OK):
        raise InvalidRequestError(option, f"{path.parent} is no directory to write to")
