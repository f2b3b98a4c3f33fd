"""Real Prometheus, the shipped configuration, a running server: does every panel get data?

    python -m tests.docker.live_dashboard

Needs `prometheus` on the PATH (Debian: `apt install prometheus`) and bubblewrap. In a network of
its own, where the host name `server` is this machine, the server runs with compose.yaml's own
environment and a tiny random model, and Prometheus with docker/prometheus as it is, down to the
path of the key. Takes two minutes: the scrape interval, too, is the shipped one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import yaml
from rich.console import Console
from rich.table import Table

from clients.sandbox.opening import find_bwrap
from tests.docker.dockerfile import ROOT
from tests.docker.panels import queries, read_dashboard
from tests.helpers import make_tiny_llama, source_text

SERVER = "http://server:8000"
PROMETHEUS = "http://127.0.0.1:9090"
TRAFFIC_SECONDS = 95.0

# So small that a minute of traffic fills everything there is to fill, and so coarse a step that
# some updates have to be rolled back.
CRAMPED = {
    "PONDERTTT_ADAPTER_SLOTS": "3",
    "PONDERTTT_RAM_SESSIONS": "0",
    "PONDERTTT_MAX_NUM_SEQS": "2",
    "PONDERTTT_MAX_WAITING": "3",
    "PONDERTTT_PREFIX_CACHE_BYTES": str(1 << 20),
    "PONDERTTT_SESSION_WRITE_DELAY": "0.2",
    "PONDERTTT_LEARNING_RATE": "0.2",
    "PONDERTTT_MEASURE_COSTS": "0",
    "OMP_NUM_THREADS": "1",
}


def outside(directory: Path) -> int:
    """Make keys, and run the rest in namespaces where the shipped names and paths lead here."""
    if shutil.which("prometheus") is None:
        raise SystemExit("there is no `prometheus` on the PATH; on Debian: apt install prometheus")
    bwrap = find_bwrap()
    if not bwrap:
        raise SystemExit("there is no bubblewrap; on Debian: apt install bubblewrap")
    make_keys = {**os.environ, "SECRETS": str(directory), "PONDERTTT": ponderttt()}
    subprocess.run([ROOT / "docker" / "secrets.sh"], env=make_keys, check=True)
    (directory / "hosts").write_text("127.0.0.1 localhost server\n")
    make_tiny_llama(directory / "model")
    command: list[str | Path] = [bwrap[0], "--unshare-net", "--unshare-pid", "--die-with-parent"]
    command += ["--dev-bind", "/", "/", "--proc", "/proc", "--tmpfs", "/run"]
    command += ["--ro-bind", directory / "hosts", "/etc/hosts"]
    command += ["--ro-bind", ROOT / "docker" / "prometheus", "/etc/prometheus"]
    for name, secret in compose()["secrets"].items():
        command += ["--ro-bind", directory / secret["file"], f"/run/secrets/{name}"]
    command += [sys.executable, "-m", "tests.docker.live_dashboard", "--inside", directory]
    return subprocess.run(command, cwd=ROOT).returncode


def inside(directory: Path) -> int:
    """Run server, Prometheus and traffic; print what each query gives."""
    environment = {**os.environ, **compose()["services"]["server"]["environment"], **CRAMPED}
    environment |= {"PONDERTTT_MODEL": str(directory / "model"), "PONDERTTT_HOST": "0.0.0.0"}
    environment["PONDERTTT_DATA"] = str(directory / "data")
    log = (directory / "server.log").open("w")
    server = subprocess.Popen([ponderttt(), "serve"], env=environment, stdout=log, stderr=log)
    options = ["--config.file=/etc/prometheus/prometheus.yml", "--log.level=warn"]
    prometheus: subprocess.Popen[bytes] | None = None
    try:
        until(lambda: httpx.get(f"{SERVER}/ready").status_code == 200, "the server", server)
        prometheus = subprocess.Popen(
            ["prometheus", *options, f"--storage.tsdb.path={directory / 'tsdb'}"]
        )
        until(
            lambda: httpx.get(f"{PROMETHEUS}/-/ready").status_code == 200, "Prometheus", prometheus
        )
        drive((directory / "secrets" / "user.key").read_text(), TRAFFIC_SECONDS)
        return report()
    except RuntimeError:
        print((directory / "server.log").read_text()[-4000:], file=sys.stderr)
        raise
    finally:
        for process in (server, prometheus):
            if process is not None:
                process.send_signal(signal.SIGTERM)
                process.wait(60)


def until(ready: Callable[[], bool], what: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until something answers."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{what} ended with {process.returncode}")
        try:
            if ready():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{what} was not ready in time")


def drive(key: str, seconds: float) -> None:
    """Traffic of every kind: sessions that learn, the same text again, bursts, bad requests."""
    stop = time.monotonic() + seconds
    headers = {"Authorization": f"Bearer {key}"}
    text = source_text()

    def client(number: int) -> None:
        with httpx.Client(base_url=SERVER, headers=headers, timeout=60) as http:
            for name in (f"{number}-a", f"{number}-b"):
                http.post("/v1/sessions", json={"id": name})
            turn = 0
            while time.monotonic() < stop:
                turn += 1
                one_turn(http, f"{number}-{'ab'[turn % 2]}", text, turn)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def one_turn(http: httpx.Client, session: str, text: str, turn: int) -> None:
    """A document and a completion of one session, and now and then something else."""
    start = 700 * (turn // 2 % 40)
    gates: tuple[dict[str, Any], ...] = (
        {"gate": "threshold", "budget": 3.0},
        {"gate": "fixed", "action": ("UPDATE_1", "UPDATE_2", "UPDATE_4")[turn % 3]},
    )
    document = {"path": "a.py", "text": text[start : start + 700]}
    options = {**gates[turn % 2], "chunk_size": 64}
    http.post(f"/v1/sessions/{session}/adapt", json={"documents": [document], **options})
    body = {"prompt": text[:300], "max_tokens": 12, "ttt": {"session": session, "gate": "off"}}
    http.post("/v1/completions", json=body)
    if turn % 5 == 0:
        http.post("/v1/completions", json={**body, "max_tokens": -1})
        http.post("/v1/completions", json={"prompt": [text[:200]] * 4, "max_tokens": 40})
    time.sleep(0.1)


def ask(path: str, **parameters: str) -> Any:
    """Prometheus' answer."""
    answer = httpx.get(f"{PROMETHEUS}/api/v1/{path}", params=parameters)
    answer.raise_for_status()
    return answer.json()["data"]


def report() -> int:
    """Print each query's result; 1 where a query gives nothing or a rule can't be evaluated."""
    table = Table("panel", "query", "series", "values")
    empty = 0
    for query in queries(read_dashboard()):
        found = ask("query", query=query.promql())["result"]
        values = sorted(float(each["value"][1]) for each in found)
        real = [value for value in values if value == value]
        empty += not real
        span = f"{real[0]:.4g} … {real[-1]:.4g}" if real else "NOTHING"
        table.add_row(query.panel, query.legend, str(len(found)), span)
    console = Console(width=120)
    console.print(table)
    rules = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
    sick = [rule["name"] for rule in rules if rule["health"] != "ok"]
    states = ", ".join(f"{rule['name']} {rule['state']}" for rule in rules)
    console.print(f"alerts: {states}")
    up = ask("query", query="up")["result"][0]
    console.print(f"{table.row_count} queries, {empty} without data; up = {up['value'][1]}")
    return int(bool(empty or sick or up["value"][1] != "1"))


def compose() -> dict[str, Any]:
    """The compose file."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    return loaded


def ponderttt() -> str:
    """The command of the environment that this runs in."""
    return str(Path(sys.executable).parent / "ponderttt")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        return inside(given.inside)
    with tempfile.TemporaryDirectory(prefix="ponderttt-dashboard-") as directory:
        return outside(Path(directory))


if __name__ == "__main__":
    sys.exit(main())
