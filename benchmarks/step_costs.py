"""What the actions cost: UPDATE_1, 2 and 4 as multiples of SKIP, and features and gate.

    .venv/bin/python benchmarks/step_costs.py --model smollm2-135m

The chunks of one text are read in turn with each action in alternation, so that all of them meet
the same state of the machine; figures are ratios of medians within this run. The policy network is
an untrained one of the shipped shape: its decisions are thrown away, only its time counts.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ponderttt import Action, Engine, EngineConfig, TTTParams
from ponderttt.adaptation.features import FEATURE_NAMES, extract
from ponderttt.adaptation.observation import History
from ponderttt.adaptation.observe import ChunkRead, observe, score
from ponderttt.adaptation.policy import PolicyGate, PolicyMetadata, PolicyNetwork

CHUNK = 256


def action_seconds(engine: Engine, repeats: int) -> dict[Action, float]:
    """Median seconds of a 256-token chunk per action, read and write."""
    text = _code()
    tokens = engine.core.tokenizer.encode(text)[: CHUNK * 2]
    text = engine.core.tokenizer.decode(tokens)
    seconds: dict[Action, list[float]] = {action: [] for action in Action}
    for repeat in track(range(repeats + 1), description="actions"):
        for action in Action:
            session = engine.session(f"{action.name}-{repeat}")
            reports = session.adapt(text, ttt=TTTParams(action=action, chunk_size=CHUNK))
            engine.core.delete_session(session.name)
            full = [r.seconds for r in reports if r.end - r.start == CHUNK]
            if repeat:  # the first round warms up
                seconds[action] += full
    return {action: statistics.median(times) for action, times in seconds.items()}


@torch.inference_mode()
def gate_seconds(engine: Engine, repeats: int) -> tuple[float, float]:
    """Median seconds of (features and policy, a chunk's read) at contexts up to 1,024 tokens."""
    core = engine.core
    model, first = core.model, core.bank.layout.first_layer
    ids = torch.tensor(core.tokenizer.encode(_code())[:1024])
    cache = model.new_cache(len(ids))
    hidden = model.config.hidden_size
    boundary, final = torch.empty(len(ids), hidden), torch.empty(len(ids), hidden)
    width = len(FEATURE_NAMES)
    gate = PolicyGate(
        PolicyNetwork((64, 64)),
        PolicyMetadata("timing only", CHUNK, "nominal", (2.0,), (0.0,) * width, (1.0,) * width),
    )
    reads, gates = [], []
    for _ in track(range(repeats), description="features"):
        for start in range(0, len(ids), CHUNK):
            begun = time.perf_counter()
            batch = model.batch([(cache, start, CHUNK)])
            x = model.run(model.embed(ids[start : start + CHUNK], batch), 0, first, batch)
            boundary[start : start + CHUNK] = x
            x = model.run(x, first, model.config.num_layers, batch)
            final[start : start + CHUNK] = model.normed(x)
            read = ChunkRead(ids, start, start + CHUNK, boundary, final, cache)
            scores = score(model, read)
            middle = time.perf_counter()
            text = core.tokenizer.decode(ids[start : start + CHUNK].tolist())
            seen = observe(model, first, read, scores, text, CHUNK, History())
            gate.logits(extract(seen)[None])
            reads.append(middle - begun)
            gates.append(time.perf_counter() - middle)
    return statistics.median(gates), statistics.median(reads)


def _code() -> str:
    spec = importlib.util.find_spec("argparse")
    if spec is None or spec.origin is None:
        raise typer.BadParameter("the standard library has no source here")
    return Path(spec.origin).read_text()


def main(
    model: Annotated[str, typer.Option(help="Embedded name, hub name or path.")] = "smollm2-135m",
    repeats: Annotated[int, typer.Option(help="Rounds after the one that warms up.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write.")] = None,
) -> None:
    """Measure, print a table, write JSON."""
    engine = Engine.from_pretrained(model, config=EngineConfig(), progress=True)
    seconds = action_seconds(engine, repeats)
    gate, read = gate_seconds(engine, repeats)
    ratios = {a.name: seconds[a] / seconds[Action.SKIP] for a in Action}
    calibrated = {a.name: engine.core.costs["measured"][a] for a in Action}
    table = Table("action", "× SKIP, measured", "calibrated at start-up", "nominal")
    for action in Action:
        nominal = engine.core.costs["nominal"][action]
        table.add_row(
            action.name,
            f"{ratios[action.name]:.2f}",
            f"{calibrated[action.name]:.2f}",
            f"{nominal:g}",
        )
    overhead = gate / read
    Console().print(f"{model}, chunks of {CHUNK} tokens", table)
    Console().print(f"features and gate: {gate * 1e3:.2f} ms, {overhead:.2%} of a chunk's read")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "model": model,
            "skip_seconds": seconds[Action.SKIP],
            "ratios": ratios,
            "calibrated": calibrated,
            "features_overhead": overhead,
        }
        json_file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
