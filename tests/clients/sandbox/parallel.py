"""Runs many programs at once, as the benchmarks do."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from clients.sandbox import Limits, Outcome, Sandbox


def run_many(
    sandbox: Sandbox, pairs: Sequence[tuple[str, str | None]], limits: Limits, workers: int
) -> list[Outcome]:
    """Outcomes of programs and their checks, in the order of the pairs."""

    def run(pair: tuple[str, str | None]) -> Outcome:
        return sandbox.run_fairly(pair[0], limits, check=pair[1])

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, pairs))
