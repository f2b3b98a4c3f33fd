"""Whether JSON that somebody else wrote holds what is read from it, and if not, what to say.

A check takes a value and tells the place in it that is wrong, and how; None where all is well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

#: Where in a value, as `.cost.chunks` or `[3].action`; and what is wrong there.
Fault = tuple[str, str]
Check = Callable[[Any], Fault | None]
_LONGEST = 60


def fault(name: str, value: object, check: Check) -> str | None:
    """What is wrong with a value, for a message; None for nothing.

    Args:
        name: of the value; empty where it is the whole.
        value: from JSON.
        check: what it should be.
    """
    found = check(value)
    if found is None:
        return None
    where, wrong = found
    return f"{(name + where).lstrip('.') or 'it'} {wrong}"


def scalar(what: str, fits: Callable[[Any], bool]) -> Check:
    """A value without parts.

    Args:
        what: for the message: a number, a text, …
        fits: whether a value is one.
    """

    def check(value: Any) -> Fault | None:
        return None if fits(value) else ("", f"is {_shown(value)}, not {what}")

    return check


def or_null(inner: Check) -> Check:
    """Either null or what another check asks for."""
    return lambda value: None if value is None else inner(value)


def fields(needed: Mapping[str, Check], others: Mapping[str, Check] | None = None) -> Check:
    """An object; fields that aren't named may hold anything.

    Args:
        needed: must be there.
        others: may be missing.
    """

    def check(value: Any) -> Fault | None:
        if not isinstance(value, Mapping):
            return "", f"is {_shown(value)}, not an object"
        for name, inner in {**needed, **(others or {})}.items():
            if name not in value:
                if name in needed:
                    return f".{name}", "is missing"
                continue
            found = inner(value[name])
            if found is not None:
                return f".{name}{found[0]}", found[1]
        return None

    return check


def each(inner: Check) -> Check:
    """A list of values that another check asks for."""

    def check(value: Any) -> Fault | None:
        if not isinstance(value, list):
            return "", f"is {_shown(value)}, not a list"
        for place, item in enumerate(value):
            found = inner(item)
            if found is not None:
                return f"[{place}]{found[0]}", found[1]
        return None

    return check


def is_number(value: object) -> bool:
    """A finite one; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object) -> bool:
    """A whole number from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


text = scalar("a text", lambda value: isinstance(value, str))
boolean = scalar("true or false", lambda value: isinstance(value, bool))
number = scalar("a number", is_number)
count = scalar("a whole number from 0 on", is_count)


def finite(value: Any) -> Any:
    """The same, with None for the numbers that JSON can't hold, which servers send all the same."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return value


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"
