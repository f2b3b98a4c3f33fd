"""Limits and checks that the tests of the sandbox share."""

from __future__ import annotations

from clients.sandbox import Limits

QUICK = Limits(wall_seconds=5.0, cpu_seconds=2.0)
CHECK = "assert add(1, 2) == 3\n"
CLOSE = "assert abs(add(1, 2) - 3) < 1e-6\n"
