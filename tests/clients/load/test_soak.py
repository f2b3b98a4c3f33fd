"""A short soak of a real server in a process of its own; benchmarks/soak.py runs long ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from clients.load.soak import Seen, Soak, process_rss, summary
from tests.helpers import source_text

ROOT = Path(__file__).parents[3]
COMMAND = "import typer\nfrom server.cli import serve\ntyper.run(serve)"
NAMES = ("soak-0", "soak-1", "soak-2")


@pytest.fixture
def server(tiny_llama_dir: Path) -> Iterator[tuple[str, int]]:
    """URL and process id of a server with little room."""
    options = ["--model", str(tiny_llama_dir), "--port", "0", "--no-measure-costs",
               "--threads", "1", "--log-level", "error", "--max-num-seqs", "4",
               "--max-waiting", "4", "--adapter-slots", "4",
               "--prefix-cache-bytes", "2000000"]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        found = next(filter(None, (re.search(r"http://\S+", line) for line in running.stdout)))
        try:
            yield found[0], running.pid
        finally:
            running.terminate()
            running.wait(30)
    assert running.returncode == 0


async def test_more_than_the_capacity_loses_nothing_leaks_nothing_and_answers_in_time(
    server: tuple[str, int],
) -> None:
    url, pid = server
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        soak = Soak(client, source_text(), NAMES, lambda: process_rss(pid), prompt_chars=400)
        await soak.prepare()
        capacity = await soak.capacity(users=8, seconds=5)
        assert await soak.broken_promises() == []
        # At least what a tiny model can not do, in case the machine was busy just now.
        rate = max(2 * capacity, 60.0)
        await soak.load(rate, seconds=12)
        assert await soak.broken_promises() == []
        metrics = (await client.get("/metrics")).text
    figures = summary(soak, rate)
    assert figures["outcomes"]["ok"] > 50
    assert figures["outcomes"]["rejected"] > 0, "it was no overload"
    # Eight places at most, running or in line: nobody who is let in waits for long.
    assert figures["p99_seconds"] < 20 * 8 / capacity + 5
    assert figures["rss_end_bytes"] < 1.1 * figures["rss_warm_bytes"]
    assert sum(soak.versions.values()) > 0
    assert "ponderttt_num_requests_running 0.0" in metrics
    assert "ponderttt_num_requests_waiting 0.0" in metrics


async def test_lies_and_losses_are_found() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"version": 1, "chunks": 2})
        if request.url.path == "/v1/completions":
            return httpx.Response(200, text='data: {"ttt": null}\n\n')
        return httpx.Response(500, text="oops")

    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(base_url="http://localhost", transport=transport) as client:
        soak = Soak(client, source_text(), ("a", "b"))
        assert (await soak._stream()).startswith("lost: the stream ended")
        assert await soak._adapt() == "500: oops"
        soak._note({"session": "a", "version_after": 1, "chunks": [1, 2]})
        assert await soak.broken_promises() == []
        soak._note({"ttt": {"session": "b", "version_after": 2, "chunks": []}})
        soak.seen += [Seen("chat", "rejected", 0.1, 0.1), Seen("chat", "500: oops", 0.1, 0.1)]
        promises = await soak.broken_promises()
    assert promises[0] == "chat: 500: oops"
    assert promises[1].startswith("session b: version 1")
    assert len(promises) == 2
