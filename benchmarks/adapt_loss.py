"""Does a session learn? Mean next-token loss on real code, by gate, through the served /adapt.

Start a server (`make serve ARGS="--model smollm2-135m"`), then

    .venv/bin/python benchmarks/adapt_loss.py --json benchmarks/results/adapt_loss.json

Each package's files (in the order of their paths, cut at 2,048 tokens, those under 512 left out,
until the wanted number of tokens is reached) are taught to a new session per gate; each chunk's
loss is measured before the chunk is learned.
"""

from __future__ import annotations

import importlib.util
import json
import platform
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

MAX_FILE_TOKENS, MIN_FILE_TOKENS = 2048, 512

GATES: dict[str, dict[str, Any]] = {
    "off": {"gate": "off"},
    "fixed UPDATE_1": {"gate": "fixed", "action": "UPDATE_1"},
    "threshold, budget 2": {"gate": "threshold", "budget": 2.0},
}


def package_documents(http: httpx.Client, package: str, tokens: int) -> list[dict[str, str]]:
    """Files of an installed package as documents for /adapt, `tokens` in all or a little more."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise typer.BadParameter(f"{package} is not an installed package")
    root = Path(spec.submodule_search_locations[0])
    documents, total = [], 0
    for path in sorted(root.rglob("*.py")):
        ids = _post(http, "/tokenize", {"prompt": path.read_text()})["tokens"][:MAX_FILE_TOKENS]
        if len(ids) < MIN_FILE_TOKENS:
            continue
        text = _post(http, "/detokenize", {"tokens": ids})["prompt"]
        documents.append({"path": str(path.relative_to(root.parent)), "text": text})
        total += len(ids)
        if total >= tokens:
            return documents
    raise typer.BadParameter(f"{package} has only {total} tokens of code")


def measure(
    http: httpx.Client, session: str, documents: list[dict[str, str]], gate: dict[str, Any],
    advance: Any,
) -> dict[str, Any]:  # fmt: skip
    """Teach a new session and return the losses before learning."""
    _post(http, "/v1/sessions", {"id": session})
    try:
        chunks = []
        for document in documents:
            report = _post(http, f"/v1/sessions/{session}/adapt", {"documents": [document], **gate})
            chunks += report["chunks"]
            advance()
    finally:
        http.delete(f"/v1/sessions/{session}")
    half = len(chunks) // 2
    return {
        "loss": _mean_loss(chunks),
        "second_half": _mean_loss(chunks[half:]),
        "chunks": len(chunks),
        "tokens": sum(c["tokens"][1] - c["tokens"][0] for c in chunks),
        "actions": dict(Counter(c["action"] for c in chunks)),
        "rolled_back": sum(c["reason"] == "rolled_back" for c in chunks),
        "nominal_cost": sum(c["nominal"] for c in chunks) / len(chunks),
        "measured_cost": sum(c["measured"] for c in chunks) / len(chunks),
        "seconds": sum(c["seconds"] for c in chunks),
    }


def _mean_loss(chunks: list[dict[str, Any]]) -> float:
    # Nothing predicts the first token of a file.
    counts = [c["tokens"][1] - max(c["tokens"][0], 1) for c in chunks]
    total = sum(c["loss_before"] * n for c, n in zip(chunks, counts, strict=True))
    return float(total / sum(counts))


def _post(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = http.post(path, json=body)
    if response.is_error:
        raise typer.BadParameter(f"{path}: {response.text}")
    answer: dict[str, Any] = response.json()
    return answer


def main(
    base_url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    packages: Annotated[str, typer.Option(help="Installed packages, by commas.")] = "jinja2,fsspec",
    tokens: Annotated[int, typer.Option(help="Tokens per package, at least.")] = 15_000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write.")] = None,
) -> None:
    """Measure, print a table, write JSON after every row."""
    http = httpx.Client(base_url=base_url, timeout=None)
    model = http.get("/v1/models").json()["data"][0]["id"]
    result: dict[str, Any] = {
        "model": model,
        "machine": platform.processor() or platform.machine(),
        "rows": [],
    }
    names = packages.split(",")
    table = Table("package", "gate", "tokens", "loss", "second half", "cost", "updates", "seconds")
    with Progress() as progress:
        for package in names:
            documents = package_documents(http, package, tokens)
            for name, gate in GATES.items():
                task = progress.add_task(f"{package}, {name}", total=len(documents))
                row = measure(
                    http,
                    f"bench-{package}-{gate['gate']}",
                    documents,
                    gate,
                    lambda task=task: progress.advance(task),
                )
                result["rows"].append({"package": package, "gate": name, **row})
                updates = row["chunks"] - row["actions"].get("SKIP", 0)
                table.add_row(
                    package, name, f"{row['tokens']:,}", f"{row['loss']:.3f}",
                    f"{row['second_half']:.3f}", f"{row['nominal_cost']:.2f}",
                    f"{updates}/{row['chunks']}", f"{row['seconds']:.0f}",
                )  # fmt: skip
                if json_file is not None:
                    json_file.parent.mkdir(parents=True, exist_ok=True)
                    json_file.write_text(json.dumps(result, indent=2) + "\n")
    Console().print(f"{model}, chunks of 256 tokens", table)


if __name__ == "__main__":
    typer.run(main)
