"""Where things are kept on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CACHE_VARIABLE = "PONDERTTT_CACHE"


def cache_dir() -> Path:
    """The directory for everything that can be fetched or computed again; it may not exist yet.

    `PONDERTTT_CACHE` where it is set, else the user's cache directory of the platform
    (`~/.cache/ponderttt` on Linux, or below `XDG_CACHE_HOME`).
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser().absolute()
    return _user_cache() / "ponderttt"


def _user_cache() -> Path:
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    # The XDG base directory specification: a relative path is to be ignored.
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
