"""What it costs a session that the prompt tells whose weights answer: time to the first token.

Prompts of a session that has learned, new, the same again, and 8 tokens longer, with `read: auto`
and `read: session` in turn.

    python benchmarks/first_token.py --model smollm2-135m
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from ponderttt import Engine, SamplingParams, TTTParams
from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import Read

WAYS: tuple[Read, ...] = ("auto", "session")
FIRST = SamplingParams(max_tokens=1, temperature=0.0)


def code(engine: Engine, package: str) -> list[int]:
    """Tokens of an installed package's files."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise typer.BadParameter(f"{package} is not installed; name another package")
    files = sorted(Path(spec.origin).parent.rglob("*.py"))
    return [id_ for file in files for id_ in engine.core.tokenizer.encode(file.read_text())]


def main(
    model: Annotated[str, typer.Option(help="Embedded name, hub name or path.")] = "smollm2-135m",
    package: Annotated[str, typer.Option(help="An installed package, for prompts.")] = "httpx",
    rounds: Annotated[int, typer.Option(help="Prompts of each length and way.")] = 3,
    threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 2,
) -> None:
    """Measure and print medians in seconds."""
    torch.set_num_threads(threads)
    engine = Engine.from_pretrained(model)
    text, used = code(engine, package), 256
    learn = TTTParams(session="s", gate="fixed", action=Action.UPDATE_1)
    engine.session("s")
    engine.generate([text[:used]], FIRST, learn)
    table = Table("tokens", "prompt", *WAYS, "ratio")
    for length in (128, 512, 1024):
        seconds: dict[tuple[str, Read], list[float]] = {}
        for _ in range(rounds):
            for way in WAYS:
                prompt, longer = text[used : used + length], text[used : used + length + 8]
                used += length + 8
                for name, ids in (("new", prompt), ("again", prompt), ("8 more", longer)):
                    begun = time.perf_counter()
                    reads = TTTParams(session="s", gate="off", read=way)
                    engine.generate([ids], FIRST, reads)
                    seconds.setdefault((name, way), []).append(time.perf_counter() - begun)
        for name in ("new", "again", "8 more"):
            auto, session = (statistics.median(seconds[name, way]) for way in WAYS)
            table.add_row(
                str(length), name, f"{auto:.4f}", f"{session:.4f}", f"{auto / session:.2f}"
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
