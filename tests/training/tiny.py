"""A recipe small enough to run: generated repositories, and a model of random weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

REPOSITORIES = ("ash", "birch", "cedar", "elm", "fir", "oak")
HELD_OUT = ("fir", "oak")
_SYLLABLES = ("ba", "do", "ki", "lu", "me", "no", "pa", "ri", "so", "tu", "ve", "zi")


def write_repository(root: Path, name: str, files: int = 4, functions: int = 6) -> Path:
    """A directory of Python files whose names recur within the repository and nowhere else."""
    draw = random.Random(name)
    words = ["".join(draw.choices(_SYLLABLES, k=3)) for _ in range(24)]
    folder = root / name
    folder.mkdir(parents=True)
    for index in range(files):
        lines = []
        for _ in range(functions):
            first, second, third = draw.sample(words, 3)
            number = draw.randrange(1000)
            lines += [
                f"def {first}_{second}({third}):",
                f'    """Return the {second} of {third}."""',
                f"    return {first}({third}, {number})",
                "",
            ]
        (folder / f"{words[index]}{index}.py").write_text("\n".join(lines))
    return folder


def recipe_values(model: Path, root: Path) -> dict[str, Any]:
    """As a recipe's file holds it; episodes of 6 chunks of 32 tokens in two documents or more."""
    return {
        "model": str(model),
        "corpora": {
            "repositories": [str(root / name) for name in REPOSITORIES],
            "held_out": list(HELD_OUT),
            "shares": [0.75, 0.25, 0.0],
        },
        "episodes": {
            "chunk_size": 32,
            "chunks": 6,
            "document_tokens": 112,
            "least_tokens": 64,
        },
        "collect": {"lanes": 2, "peek_tokens": 16, "later_places": 1},
        "budgets": [1.5, 3.0],
        "reward_scale": 0.1,
        "num_envs": 4,
        "ppo": {
            "num_steps": 8,
            "iterations": 4,
            "minibatch_size": 16,
            "epochs": 2,
            "hidden_sizes": [8],
        },
    }


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    """The file of a recipe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path
