"""Inject what may go wrong, count what comes of it, and fail where anything was lost.

    .venv/bin/python -m benchmarks.faults --json benchmarks/results/faults.json

    damaged   random damage to stored sessions (a tiny random model: its files are checked alike)
    failing   a store of which 10 or 30 % of the reads and writes fail, over HTTP (tiny model);
              a commit writes four files
    slow      a store each of whose calls takes 0.3 s longer, over HTTP (tiny model)
    disk      a small disk that is really full, then really read-only, over HTTP (tiny model)
    updates   updates that explode, climb, give NaN or run out of memory (smollm2-135m)
    isolation a secret that one session has learned, and its traffic (smollm2-135m)
    cold      a request to a session that is in the store alone (smollm2-135m)

`--only` runs some of them and leaves what the JSON file says of the others.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults import damage, learning, stores
from benchmarks.faults.check import Result
from tests.helpers import make_tiny_llama

EXPERIMENTS: dict[str, Callable[[Path, Path, int], Result]] = {
    f.__name__: f
    for f in (
        damage.damaged,
        stores.failing,
        stores.slow,
        stores.disk,
        learning.updates,
        learning.isolation,
        learning.cold,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts here")
    parser.add_argument("--disk", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("ponderttt").setLevel(logging.CRITICAL)  # it says all that is injected
    if options.disk:
        print(json.dumps(stores.on_disk(*options.disk)), flush=True)
        os._exit(0)
    known = options.json is not None and options.json.exists()
    results: Result = json.loads(options.json.read_text()) if known else {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as directory:
            scratch, begun = Path(directory), time.monotonic()
            result = EXPERIMENTS[name](make_tiny_llama(scratch / "tiny"), scratch, options.seed)
        took = {"seed": options.seed, "seconds": round(time.monotonic() - begun, 1),
                "load average": round(os.getloadavg()[0], 1)}  # fmt: skip
        results[name] = result | took
        print(name, json.dumps(results[name], indent=2), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
