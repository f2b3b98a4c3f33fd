"""The table's ratios as one flat object, under names that scripts can rely on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from ponderttt.bench.results import Results
from ponderttt.errors import InvalidRequestError


class Place(NamedTuple):
    """Which comparison of which row: by the names of its sides."""

    row: str
    ours: str
    theirs: str


PLACES = {
    "decode_1_vs_vllm": Place("decode-1", "ours", "vllm"),
    "decode_1_vs_hf": Place("decode-1", "ours", "hf"),
    "decode_1_bandwidth_share": Place("decode-1", "ours", "memory"),
    "decode_16_vs_vllm": Place("decode-16", "ours", "vllm"),
    "prefill_2048_vs_hf": Place("prefill-2048", "ours", "hf"),
    "serve_8_prompt_heavy_vs_peft_loop": Place("prompt-heavy-8", "ours", "full"),
    "serve_8_generation_heavy_vs_peft_loop": Place("generation-heavy-8", "ours", "full"),
    "serve_16_generation_heavy_vs_peft_loop": Place("generation-heavy-16", "ours", "full"),
    "write_8_batched_vs_single": Place("write-8", "batched", "single"),
    "update_1_cost": Place("actions", "UPDATE_1", "SKIP"),
    "update_2_cost": Place("actions", "UPDATE_2", "SKIP"),
    "update_4_cost": Place("actions", "UPDATE_4", "SKIP"),
    "features_overhead": Place("features-and-gate", "gate", "forward"),
    "ttft_seen_after_update_vs_cold": Place("seen-prompt", "seen", "cold"),
    "decode_during_write": Place("decode-during-write", "beside a writer", "alone"),
    "ttft_background_vs_off": Place("background-first-token", "background", "off"),
    "decode_16_distinct_vs_same_adapter": Place("decode-different", "different", "same"),
    "idle_session_bytes_ratio": Place("idle-session", "resident", "state"),
}


def ratios(results: Results) -> dict[str, float | None]:
    """Medians by name; None for what was not measured, or whose peer is not installed."""
    return {name: _median(results, place) for name, place in PLACES.items()}


def _median(results: Results, place: Place) -> float | None:
    for comparison in results.rows.get(place.row, {}).get("comparisons", ()):
        if (comparison["ours"], comparison["theirs"]) == (place.ours, place.theirs):
            found = comparison.get("ratio")
            return None if found is None else float(found["median"])
    return None


def write_ratios(results: Results, path: Path) -> None:
    """The ratios, and beside them everything that `bench.json` holds.

    Raises:
        InvalidRequestError: the file cannot be written.
    """
    value = {
        "ratios": ratios(results),
        "settings": results.settings,
        "rows": results.rows,
        "scaling": results.scaling,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise InvalidRequestError("json", f"{path} cannot be written: {error}") from error
