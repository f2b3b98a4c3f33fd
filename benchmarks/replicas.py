"""How many replicas a load needs, from what one replica was measured to do.

    ponderttt bench load --concurrency 16 --ttft-bound 0.5 --json one.json     (against one replica)
    python benchmarks/replicas.py one.json --requests-per-second 40 --gpus-per-replica 1

replicas = ceil(load / (goodput of one × utilisation)) + spare
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path


def replicas_for(load: float, goodput: float, utilisation: float, spare: int) -> int:
    """Replicas for a load.

    Args:
        load: requests per second.
        goodput: requests per second that one replica answers in time.
        utilisation: share of the goodput that is planned with, in (0, 1].
        spare: replicas that may be missing.
    """
    return math.ceil(load / (goodput * utilisation)) + spare


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("measured", type=Path, help="what `ponderttt bench load --json` wrote")
    parser.add_argument("--requests-per-second", type=float, required=True)
    parser.add_argument("--utilisation", type=float, default=0.7)
    parser.add_argument("--spare", type=int, default=1)
    parser.add_argument("--gpus-per-replica", type=float, default=0.0)
    given = parser.parse_args()
    if not 0 < given.utilisation <= 1:
        parser.error(f"--utilisation: {given.utilisation} must be above 0 and at most 1")
    if given.requests_per_second <= 0 or given.spare < 0 or given.gpus_per_replica < 0:
        parser.error(
            "--requests-per-second must be above 0, --spare and --gpus-per-replica not below"
        )
    goodput = json.loads(given.measured.read_text())["summary"]["goodput"]
    if not goodput["per_second"]:
        sys.exit(
            f"{given.measured}: no request was answered within {goodput['bounds']}; measure with "
            "fewer users (--concurrency), or other bounds"
        )
    count = replicas_for(
        given.requests_per_second, goodput["per_second"], given.utilisation, given.spare
    )
    print(
        f"one replica: {goodput['per_second']:.3g} requests/s within {goodput['bounds']}\n"
        f"{given.requests_per_second:g} requests/s at {given.utilisation:.0%} utilisation, "
        f"{given.spare} spare: {count} replicas"
    )
    if given.gpus_per_replica:
        print(f"GPUs: {count * given.gpus_per_replica:g}")


if __name__ == "__main__":
    main()
