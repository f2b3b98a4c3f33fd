"""What a session, a position and a model take, from the shapes: memory and disk.

    .venv/bin/python benchmarks/sizing.py smollm2-135m qwen2.5-coder-0.5b --json out.json

In fp32, with the model's calibrated fast weights. The bank's slot is measured on a bank, not
computed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ponderttt.adaptation.calibration import calibration_for
from ponderttt.engine.config import served_name
from ponderttt.fast_weights.bank import AdapterBank
from ponderttt.fast_weights.layout import AdapterLayout
from ponderttt.models import store
from ponderttt.models.checkpoint import load_decoder

_FLOAT = 4


def measure(model: str) -> dict[str, object]:
    """Bytes of everything that comes in numbers."""
    directory = store.resolve(model, progress=False)
    decoder = load_decoder(directory)
    config = decoder.config
    lora = calibration_for(served_name(model)).lora
    layout = AdapterLayout(decoder, lora)
    bank = AdapterBank(layout, 1, torch.device("cpu"), torch.float32)
    state = bank.fresh_state()
    matrices = [decoder.head, *(linear.matrix for b in decoder.blocks for linear in b.linears())]
    weights = sum(matrix.weight.nbytes for matrix in matrices)
    if decoder.head.weight is not decoder.embedding:
        weights += decoder.embedding.nbytes
    adaptive = [
        linear.matrix for b in decoder.blocks[layout.first_layer :] for linear in b.linears()
    ]
    per_layer = 2 * config.num_kv_heads * config.head_dim * _FLOAT
    return {
        "model": model,
        "rank": lora.rank,
        "weights_on_disk_bytes": sum(f.stat().st_size for f in directory.glob("*.safetensors")),
        "weights_bytes": weights,
        # The head and the adaptive blocks once more, for the way back through them.
        "packed_bytes": sum(matrix.packed_bytes for matrix in matrices)
        + sum(matrix.weight.nbytes for matrix in [decoder.head, *adaptive]),
        "codes_bytes": sum(matrix.code_bytes for matrix in matrices),
        "fast_weights_bytes": state.weights.nbytes,
        "optimiser_bytes": state.first.nbytes + state.second.nbytes,
        "session_bytes": state.nbytes,
        "sessions_per_gb": int(1e9 // state.nbytes),
        "kv_bytes_per_position": per_layer * config.num_layers,
        "prefix_cache_bytes_per_position": per_layer * config.num_layers
        + config.hidden_size * _FLOAT,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", help="names or directories")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    rows = [measure(model) for model in given.models]
    table = Table("", *(str(row["model"]) for row in rows))
    for name in rows[0]:
        if name != "model":
            table.add_row(name, *(f"{row[name]:,}" for row in rows))
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
