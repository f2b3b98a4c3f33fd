"""Where things are kept on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CACHE_VARIABLE = "PONDERTTT_CACHE"
DATA_VARIABLE = "PONDERTTT_DATA"


def cache_dir() -> Path:
    """The directory for everything that can be fetched or computed again; it may not exist yet.

    `PONDERTTT_CACHE` where it is set, else the user's cache directory of the platform
    (`~/.cache/ponderttt` on Linux, or below `XDG_CACHE_HOME`).
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser().absolute()
    return _user_cache() / "ponderttt"


def data_dir() -> Path:
    """The directory for what must last, such as sessions; it may not exist yet.

    `PONDERTTT_DATA` where it is set, else the user's data directory of the platform
    (`~/.local/share/ponderttt` on Linux, or below `XDG_DATA_HOME`).
    """
    if chosen := os.environ.get(DATA_VARIABLE):
        return Path(chosen).expanduser().absolute()
    return _user_data() / "ponderttt"


def _user_data() -> Path:
    if sys.platform == "win32":
        return _user_cache()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    xdg = os.environ.get("XDG_DATA_HOME", "")
    return Path(xdg) if os.path.isabs(xdg) else Path.home() / ".local" / "share"


def _user_cache() -> Path:
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    # The XDG base directory specification: a relative path is to be ignored.
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
