"""Should a session learn from what the model wrote itself? The loss of the text that truly follows.

    .venv/bin/python benchmarks/adapt_on.py --model smollm2-135m

Each prompt is the beginning of a file of an installed package. A new session continues it greedily
while learning from the prompt, from its own text, or from both (UPDATE_1, chunks of 64); then the
file's true continuation is scored with the fast weights that came of it. Lower is better; `off` is
the model as it is. Intervals are 95% by bootstrap over the prompts, of the difference from `off`.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ponderttt import Action, Engine, EngineConfig, SamplingParams, TTTParams
from ponderttt.adaptation.params import AdaptOn

PROMPT, GENERATED, SCORED, CHUNK = 384, 192, 256, 64


def beginnings(engine: Engine, package: str, count: int) -> list[list[int]]:
    """Token ids of the first files that are long enough, cut to what is used of them."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise typer.BadParameter(f"{package} is not an installed package")
    found = []
    for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
        ids = engine.core.tokenizer.encode(path.read_text())
        if len(ids) >= PROMPT + SCORED and len(found) < count:
            found.append(ids[: PROMPT + SCORED])
    return found


def losses(engine: Engine, texts: list[list[int]], adapt_on: AdaptOn | None) -> list[float]:
    """Mean loss of each true continuation after learning, nats per token."""
    result = []
    for number, ids in enumerate(track(texts, description=str(adapt_on or "off"))):
        session = engine.session(f"{adapt_on}-{number}")
        if adapt_on is not None:
            learn = TTTParams(
                session=session.name, action=Action.UPDATE_1, adapt_on=adapt_on, chunk_size=CHUNK
            )
            sampling = SamplingParams(max_tokens=GENERATED, temperature=0.0, ignore_eos=True)
            engine.generate([ids[:PROMPT]], sampling, learn)
        score = SamplingParams(max_tokens=0, prompt_logprobs=0)
        frozen = TTTParams(session=session.name, gate="off")
        scored = engine.generate([ids], score, frozen)[0].prompt_logprobs[PROMPT:]
        result.append(-float(np.mean([token.logprob for token in scored if token is not None])))
        engine.core.delete_session(session.name)
    return result


def main(
    model: Annotated[str, typer.Option(help="Embedded name, hub name or path.")] = "smollm2-135m",
    package: Annotated[str, typer.Option(help="An installed package.")] = "huggingface_hub",
    prompts: Annotated[int, typer.Option(help="Files used.")] = 12,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write.")] = None,
) -> None:
    """Measure, print a table, write JSON."""
    engine = Engine.from_pretrained(model, config=EngineConfig(measure_costs=False))
    texts = beginnings(engine, package, prompts)
    ways: list[AdaptOn | None] = [None, *get_args(AdaptOn)]
    rows = {way or "off": losses(engine, texts, way) for way in ways}
    draws = np.random.default_rng(0).integers(len(texts), size=(10_000, len(texts)))
    table = Table("adapt_on", "loss of the true continuation", "difference from off, 95%")
    for way, values in rows.items():
        difference = np.array(values) - np.array(rows["off"])
        low, high = np.quantile(difference[draws].mean(axis=1), [0.025, 0.975])
        table.add_row(
            way, f"{np.mean(values):.4f}", f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
        )
    Console().print(f"{model}, {len(texts)} files of {package}", table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"model": model, "losses": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
