"""What is shown of a file before a hidden piece."""

from __future__ import annotations

import pytest

from clients.bench.repo_plan import left_context

LONG = "value = " + "x" * 40


@pytest.mark.parametrize(
    ("text", "limit", "shown"),
    [
        ("first = 1\nsecond = 2\n       ", 30, "first = 1\nsecond = 2\n       "),
        ("first = 1\nsecond = 2\n       ", 20, "second = 2\n       "),
        # A line that is longer than the limit, before the margin or the target itself.
        (f"{LONG}\n       ", 20, "x" * 12 + "\n       "),
        (f"{LONG}\n", 20, "x" * 19 + "\n"),
        (f"{LONG}\n\n       ", 20, "x" * 11 + "\n\n       "),
        (f"{LONG}\n    return call", 20, "    return call"),
        (LONG, 20, "x" * 20),
    ],
)
def test_left_context_is_whole_lines_and_never_blank(text: str, limit: int, shown: str) -> None:
    assert left_context(f"{text}target\nafter\n", len(text), limit) == shown
