"""The features on real code read by a real model: all vary, and none repeats another.

The model is run by transformers.
"""

from __future__ import annotations

import random
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ponderttt.adaptation.actions import NOMINAL_COSTS
from ponderttt.adaptation.features import FEATURE_NAMES, extract
from ponderttt.adaptation.observation import ChunkObservation, History

pytestmark = pytest.mark.real_model

CHUNK = 256
PROBES = 16
FIRST_ADAPTIVE = 22

#: Package, file, tokens read: templates' Python, C++, CMake and YAML, with full and short chunks.
FILES = (
    ("jinja2", "lexer.py", 1536),
    ("torch", "include/c10/util/intrusive_ptr.h", 900),
    ("jinja2", "sandbox.py", 1024),
    ("torch", "share/cmake/Caffe2/Caffe2Config.cmake", 1024),
    ("torch", "_export/serde/schema.yaml", 700),
    ("jinja2", "runtime.py", 512),
)
FILES_PER_SESSION = 2
BUDGETS = (1.5, 2.0, 3.0, 5.0, 12.0)
EMA = 0.9

Matrix = NDArray[np.float64]

#: Standard deviation as a share of the largest magnitude; rounding is below 1e-5 of it.
LEAST_DEVIATION = 0.005
LEAST_VALUES = 6
MOST_CORRELATED = 0.98


def source(package: str, path: str) -> str:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / path).read_text(encoding="utf-8")


def read(model: Any, tokenizer: Any, text: str, limit: int) -> list[ChunkObservation]:
    """One text's chunks, without a history; one forward, since no weights change on the way."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids[:limit])
    seen: list[Tensor] = []
    block = model.model.layers[FIRST_ADAPTIVE].self_attn
    hook = block.register_forward_hook(lambda *call: seen.append(call[-1][1][0]))
    out = model(ids[None], use_cache=False, output_hidden_states=True)
    hook.remove()
    logits = out.logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    chunks = []
    for start in range(0, len(ids), CHUNK):
        end = min(start + CHUNK, len(ids))
        probes = torch.linspace(start, end - 2, PROBES).round().long()
        chances = logits[probes].softmax(dim=-1)
        chunks.append(
            ChunkObservation(
                token_ids=ids[start:end],
                context_ids=ids[:start],
                text=tokenizer.decode(ids[start:end]),
                chunk_size=CHUNK,
                losses=losses[max(start - 1, 0) : end - 1],
                probe_positions=probes - start,
                probe_entropy=torch.special.entr(chances).sum(dim=-1),
                probe_top1=chances.amax(dim=-1),
                boundary=out.hidden_states[FIRST_ADAPTIVE][0, start:end],
                final=out.hidden_states[-1][0, start:end],
                attention=seen[0][:, probes, :end],
                vocab_size=model.config.vocab_size,
                history=History(),
            )
        )
    return chunks


def live(chunks: list[ChunkObservation], budget: float, draw: random.Random) -> None:
    """Give the chunks of one session the history of random actions within its budget."""
    history, spent = History(budget=budget, ahead=len(chunks) - 1), 0.0
    for index, chunk in enumerate(chunks):
        chunks[index] = replace(chunk, history=history)
        allowed = budget * (index + 1) - spent
        cost = draw.choice([c for c in NOMINAL_COSTS.values() if c <= allowed])
        spent += cost
        loss = float(chunk.losses.mean())
        history = History(
            loss_ema=EMA * history.loss_ema + (1 - EMA) * loss if index else loss,
            cost_ema=EMA * history.cost_ema + (1 - EMA) * cost,
            budget=budget,
            credit=budget * (index + 1) - spent,
            ahead=len(chunks) - index - 2,
        )


@pytest.fixture(scope="module")
def observed(smollm2_dir: Path) -> list[ChunkObservation]:
    """23 chunks of six files in three sessions."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(
        smollm2_dir, attn_implementation="eager", dtype=torch.float32
    ).eval()
    draw = random.Random(0)
    everything = []
    with torch.inference_mode():
        for first in range(0, len(FILES), FILES_PER_SESSION):
            session = []
            for package, path, limit in FILES[first : first + FILES_PER_SESSION]:
                session += read(model, tokenizer, source(package, path), limit)
            live(session, draw.choice(BUDGETS), draw)
            everything += session
    return everything


@pytest.fixture(scope="module")
def values(observed: list[ChunkObservation]) -> Matrix:
    """[chunks, 32]."""
    return torch.stack([extract(obs) for obs in observed]).double().numpy()


def ranks(column: Matrix) -> Matrix:
    """Ranks from 0, ties shared."""
    _, group, sizes = np.unique(column, return_inverse=True, return_counts=True)
    shared: Matrix = (np.cumsum(sizes) - (sizes + 1) / 2)[group]
    return shared


def pairs_beyond(matrix: Matrix, limit: float) -> list[str]:
    """Pairs of columns whose correlation exceeds `limit` either way."""
    correlation: Matrix = np.atleast_2d(np.corrcoef(matrix, rowvar=False))
    return [
        f"{FEATURE_NAMES[i]} ~ {FEATURE_NAMES[j]}: {correlation[i, j]:.3f}"
        for i in range(len(FEATURE_NAMES))
        for j in range(i)
        if not abs(correlation[i, j]) <= limit
    ]


def test_features_on_real_code_are_of_order_one(values: Matrix) -> None:
    assert np.isfinite(values).all()
    largest = np.abs(values).max(axis=0)
    assert {n: x for n, x in zip(FEATURE_NAMES, largest, strict=True) if x > 10} == {}


@pytest.mark.parametrize("name", FEATURE_NAMES)
def test_feature_on_real_code_varies(name: str, values: Matrix) -> None:
    column = values[:, FEATURE_NAMES.index(name)]
    assert column.std() > LEAST_DEVIATION * np.abs(column).max()
    assert len(set(column.tolist())) >= LEAST_VALUES
    low, high = np.quantile(column, (0.25, 0.75))
    assert high > low  # not one value with a few exceptions


def test_features_on_real_code_copy_no_other(values: Matrix) -> None:
    assert pairs_beyond(values, MOST_CORRELATED) == []


def test_features_on_real_code_order_chunks_like_no_other(values: Matrix) -> None:
    assert pairs_beyond(np.apply_along_axis(ranks, 0, values), MOST_CORRELATED) == []


def test_features_on_real_code_are_the_same_in_any_order(
    observed: list[ChunkObservation], values: Matrix
) -> None:
    again = [extract(obs) for obs in reversed(observed)]
    assert np.array_equal(torch.stack(again[::-1]).double().numpy(), values)


def test_pairs_beyond_when_a_feature_repeats_another_names_both(values: Matrix) -> None:
    copied = values.copy()
    copied[:, 5] = np.exp(-3 * copied[:, 0])  # another formula, the same order
    ranked = np.apply_along_axis(ranks, 0, copied)
    assert pairs_beyond(ranked, MOST_CORRELATED) == [
        f"{FEATURE_NAMES[5]} ~ {FEATURE_NAMES[0]}: -1.000"
    ]
