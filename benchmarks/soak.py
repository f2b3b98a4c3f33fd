"""Twice the load that a server can take, for minutes: memory, latency, and what is lost.

    .venv/bin/ponderttt serve --model smollm2-135m --max-waiting 32 --prefix-cache-bytes 100000000 &
    .venv/bin/python benchmarks/soak.py --pid $! --minutes 30 --json benchmarks/results/soak.json

The server must be new: sessions `soak-N` are made. Returns 1 where something was lost, where the
memory grew by more than --growth after the first third, or where the 99th percentile of what was
answered exceeds --p99.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

import httpx

from clients.load.soak import Soak, process_rss, summary
from clients.load.workload import Corpus


async def run(args: argparse.Namespace) -> int:
    """The run as the arguments say."""
    headers = (
        {"Authorization": f"Bearer {args.api_key_file.read_text().strip()}"}
        if args.api_key_file
        else {}
    )
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(
        base_url=args.base_url, timeout=600, limits=limits, headers=headers
    ) as client:
        rss = (lambda: process_rss(args.pid)) if args.pid else None
        names = [f"soak-{number}" for number in range(args.sessions)]
        soak = Soak(
            client, Corpus.read([]).text, names, rss, args.seed, args.prompt_chars, args.new_tokens
        )
        await soak.prepare()
        capacity = await soak.capacity(args.users, args.calibrate)
        print(f"capacity {capacity:.2f} requests/s; now {args.factor:g} times as many", flush=True)
        load = asyncio.create_task(soak.load(args.factor * capacity, args.minutes * 60))
        while not load.done():
            await asyncio.wait([load], timeout=30)
            held = f", {soak.memory[-1][1] / 1e6:.0f} MB" if soak.memory else ""
            print(f"{time.strftime('%H:%M:%S')} {len(soak.seen)} answered{held}", flush=True)
        await load
        lost = await soak.broken_promises()
    figures = summary(soak, args.factor * capacity) | {"capacity": capacity, "lost": lost[:20]}
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    grown = figures.get("rss_end_bytes", 0) > args.growth * figures.get("rss_warm_bytes", 0)
    slow = args.p99 is not None and figures["p99_seconds"] > args.p99
    return int(bool(lost) or (args.pid is not None and grown) or slow)


def main() -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key-file", type=Path, help="file with the key alone")
    parser.add_argument("--pid", type=int, help="of the server, to watch its memory")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--factor", type=float, default=2.0, help="of the capacity")
    parser.add_argument("--calibrate", type=float, default=30, help="seconds")
    parser.add_argument("--users", type=int, default=16, help="while the capacity is measured")
    parser.add_argument("--sessions", type=int, default=12)
    parser.add_argument("--prompt-chars", type=int, default=900)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--growth", type=float, default=1.05, help="of the memory, at most")
    parser.add_argument("--p99", type=float, help="seconds, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
