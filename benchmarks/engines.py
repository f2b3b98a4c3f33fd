"""When to use which engine: both under the same loads, with and without learning.

Start vLLM, and two servers of the same model; whichever is not measured idles.

    cd ~/.cache/ponderttt
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 OMP_NUM_THREADS=2 VLLM_CPU_KVCACHE_SPACE=2 \
      vllm-env/bin/python -m vllm.entrypoints.openai.api_server --model models/smollm2-135m \
      --port 8001 --dtype float32 --enforce-eager \
      --max-model-len 2048 --enable-lora --max-loras 16 --max-lora-rank 16

    make serve ARGS="--model smollm2-135m --max-model-len 2048 --port 8010"
    make serve ARGS="--model smollm2-135m --port 8011 --engine vllm --vllm-url http://127.0.0.1:8001"
    .venv/bin/python benchmarks/engines.py --json benchmarks/results/engines_smollm2-135m.json

Each user has a session of its own and waits for each answer (`ponderttt bench load`, closed loop).
Greedy, prompts of 256 tokens of code, answers of 32.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

#: What a request asks of learning. Budget 3 is one update a chunk. Where vLLM generates, the
#: session always answers, so it does here.
LEARNING: dict[str, list[str]] = {
    "off": ["gate=off"],
    "inline": ["gate=fixed", "action=UPDATE_1", "budget=3", "session=engines-{n}", "read=session"],
    "background": [
        "gate=fixed", "action=UPDATE_1", "budget=3", "when=background",
        "session=engines-{n}", "read=session",
    ],
}  # fmt: skip


def measure(url: str, sessions: int, learning: str, rounds: int, seed: int) -> dict[str, Any]:
    """The summary of one load."""
    with tempfile.TemporaryDirectory() as directory:
        summary = Path(directory) / "summary.json"
        command = [
            str(Path(sys.executable).with_name("ponderttt")), "bench", "load",
            "--base-url", url, "--concurrency", str(sessions), "--requests", str(rounds * sessions),
            "--warmup", str(sessions), "--prompt-tokens", "256", "--output-tokens", "32",
            "--body", "ignore_eos=true", "--seed", str(seed), "--timeout", "600", "--quiet",
            "--output", f"{directory}/load.jsonl", "--json", str(summary),
        ]  # fmt: skip
        for setting in LEARNING[learning]:
            command += ["--ttt", setting]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise typer.BadParameter(f"`{' '.join(command)}`: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(summary.read_text())["summary"]
    return found


def main(
    torch_url: Annotated[str, typer.Option("--torch")] = "http://127.0.0.1:8010",
    vllm_url: Annotated[str, typer.Option("--vllm")] = "http://127.0.0.1:8011",
    sessions: Annotated[str, typer.Option(help="Users at once, by commas.")] = "1,8,16",
    rounds: Annotated[int, typer.Option(help="Requests of each user.", min=1)] = 4,
    seed: int = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write.")] = None,
) -> None:
    """Measure, print a table, write JSON after every row."""
    rows: list[dict[str, Any]] = []
    table = Table("engine", "sessions", "learning", "output tokens/s", "TTFT p50", "p90", "updates")
    for count in map(int, sessions.split(",")):
        for number, learning in enumerate(LEARNING):
            for engine, url in {"torch": torch_url, "vllm": vllm_url}.items():
                # Texts of its own: a prefix cache would know them from the row before.
                got = measure(url, count, learning, rounds, seed + 100 * number)
                rows.append({"engine": engine, "sessions": count, "mode": learning, **got})
                ttft, learned = got["ttft"] or {"p50": 0, "p90": 0}, got["learning"] or {}
                table.add_row(
                    engine, str(count), learning, f"{got['completion_tokens_per_second']:.1f}",
                    f"{ttft['p50']:.2f} s", f"{ttft['p90']:.2f} s", str(learned.get("updates", 0)),
                )  # fmt: skip
                if json_file is not None:
                    json_file.parent.mkdir(parents=True, exist_ok=True)
                    json_file.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
