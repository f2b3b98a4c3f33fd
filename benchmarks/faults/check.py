"""What every experiment shares."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]


def check(is_right: bool, seen: object) -> None:
    """Stop where something came out as it must not."""
    if not is_right:
        raise SystemExit(f"not as it should be: {seen}")
