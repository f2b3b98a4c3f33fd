"""Send thousands of requests made up from the OpenAPI document; none may fail or crash the server.

    .venv/bin/python -m benchmarks.fuzz_api --requests 10000

Everything runs in this process: the application with API keys, a tiny random model, sessions. Half
of the requests fit the document and half don't (schemathesis); one in eight has odd headers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.helpers import make_tiny_qwen2
from tests.server.fuzzing import Tally, fuzz, running_app


def main() -> int:
    """Run; returns 1 where a request got what no server should give."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts here")
    args = parser.parse_args()
    tally, begun, batch = Tally(), time.monotonic(), min(args.requests, 1000)
    with tempfile.TemporaryDirectory() as directory:
        model = make_tiny_qwen2(Path(directory) / "tiny")
        with running_app(model, Path(directory) / "keys.toml") as app:
            while tally.requests < args.requests:
                fuzz(app, batch, args.seed + tally.requests, tally)
                seconds = time.monotonic() - begun
                print(f"{tally.requests} requests, {seconds:.0f} s", file=sys.stderr, flush=True)
    by_status: Counter[int] = Counter()
    for (operation, status), count in sorted(tally.statuses.items()):
        print(f"{count:6} × {status}  {operation}")
        by_status[status] += count
    print(
        f"{tally.requests} requests: "
        + ", ".join(f"{n} × {s}" for s, n in sorted(by_status.items()))
    )
    print(f"{len(tally.failures)} failures")
    for failure in tally.failures[:20]:
        print(failure)
    if args.json:
        result = {
            "requests": tally.requests,
            "seed": args.seed,
            "statuses": {str(status): count for status, count in sorted(by_status.items())},
            "failures": len(tally.failures),
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
