"""What the actions really cost here: measured once per model, device and chunk size."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ponderttt.adaptation.actions import Action, CostModel
from ponderttt.adaptation.observe import ChunkRead, Scores, score
from ponderttt.adaptation.update import Write, Writer, probabilities_fit, top_gradient
from ponderttt.config import cache_dir
from ponderttt.fast_weights.bank import AdapterBank, StepTag
from ponderttt.models.decoder import Decoder

_LOG = logging.getLogger(__name__)
_ROUNDS = 2


def estimate_costs(model: Decoder, bank: AdapterBank) -> CostModel:
    """Costs from the share α of compute above the boundary: 1 + 2kα.

    What judging the result costs, the first step saves: the read has been through the head.
    """
    c = model.config
    block = sum(p.in_features * p.out_features for p in model.module_parts(0))
    head = c.hidden_size * c.vocab_size
    above = block * (bank.layout.last_layer - bank.layout.first_layer) + head
    share = above / (block * c.num_layers + head)
    costs = {a: 1.0 + 2 * a.steps * share for a in Action}
    return CostModel("measured", costs)


def measure_costs(model: Decoder, bank: AdapterBank, writer: Writer, chunk_size: int) -> CostModel:
    """Time one chunk's read, and updates of one and two steps on it; UPDATE_4 is extrapolated.

    Takes about twenty chunk forwards.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (chunk_size,), generator=generator)
    ids = ids.to(model.device)
    cache = model.new_cache(chunk_size)
    shape = (chunk_size, model.config.hidden_size)
    boundary = torch.empty(shape, device=model.device, dtype=model.dtype)
    final = torch.empty_like(boundary)

    keep = probabilities_fit(model, chunk_size)

    @torch.inference_mode()
    def read() -> Scores:
        batch = model.batch([(cache, 0, chunk_size)])
        x = model.run(model.embed(ids, batch), 0, bank.layout.first_layer, batch)
        boundary.copy_(x)
        x = model.run(x, bank.layout.first_layer, model.config.num_layers, batch)
        final.copy_(model.normed(x))
        chunk = ChunkRead(ids, 0, chunk_size, boundary, final, cache)
        return score(model, chunk, keep=keep)

    def update(action: Action, scores: Scores) -> None:
        with torch.inference_mode():
            top = top_gradient(scores, model.head, ids[1:])
        write = Write(
            tag=StepTag(0, None, 0, "WRITE"),
            action=action,
            cache=cache,
            start=0,
            boundary=boundary[:-1],
            targets=ids[1:],
            staged=bank.fresh_state(),
            top=top,
        )
        while not write.finished:
            writer.step([write])

    device = model.device
    rounds = []
    update(Action.UPDATE_1, read())  # to warm up
    for _ in range(_ROUNDS):
        # All in turn, so that they meet the same state of a machine that others share.
        skip = _seconds(read, device)
        one = _seconds(partial(update, Action.UPDATE_1, read()), device)
        two = _seconds(partial(update, Action.UPDATE_2, read()), device)
        rounds.append((skip, one / skip, two / skip))
    skip, one, two = (statistics.median(column) for column in zip(*rounds, strict=True))
    four = two + 2 * max(two - one, 0.0)
    costs = {
        Action.SKIP: 1.0,
        Action.UPDATE_1: 1.0 + one,
        Action.UPDATE_2: 1.0 + two,
        Action.UPDATE_4: 1.0 + four,
    }
    return CostModel("measured", costs, chunk_seconds=skip)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def machine_costs(
    model: Decoder,
    bank: AdapterBank,
    writer: Writer,
    model_name: str,
    chunk_size: int,
) -> CostModel:
    """What the actions cost on this machine: the figures of an earlier start, or timed now.

    Args:
        model, bank, writer: what is timed; they are left as they were.
        model_name: as clients call it.
        chunk_size: tokens of the chunk that is timed.
    """
    layout = bank.layout
    key: dict[str, object] = {
        "model": model_name,
        "shape": [model.config.num_layers, model.config.hidden_size],
        "device": str(model.device),
        "dtype": str(model.dtype),
        "chunk_size": chunk_size,
        "lora": [layout.config.rank, layout.first_layer, layout.size],
        "optimizer": writer.rule.optimizer,
        "packed": model.head.packed_bytes > 0,
    }
    # Only where there are some, so that the figures of earlier starts stay known.
    if model.kernels is not None:
        key["kernels"] = model.kernels
    if model.compiled:
        key["compiled"] = True
    return cached_costs(
        cache_dir() / "costs", key, lambda: measure_costs(model, bank, writer, chunk_size)
    )


def cached_costs(
    directory: Path, key: dict[str, object], measure: Callable[[], CostModel]
) -> CostModel:
    """Measured costs from an earlier start on the same machine, else measured and kept.

    Args:
        directory: of the cache.
        key: everything that the figures depend on besides the machine and the versions.
        measure: called where nothing is kept.
    """
    key = {
        **key,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = directory / f"{digest}.json"
    if (known := _recall(path)) is not None:
        return known
    _LOG.info("timing the actions on this machine")
    model = measure()
    kept = {
        "key": key,
        "costs": {action.name: cost for action, cost in model.costs.items()},
        "chunk_seconds": model.chunk_seconds,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept, indent=2))
    except OSError as error:
        _LOG.warning("the measured costs cannot be kept in %s: %s", path, error)
    return model


def _recall(path: Path) -> CostModel | None:
    """The costs kept in a file; None where there is none, or it is damaged."""
    try:
        kept = json.loads(path.read_text())
        costs = {action: float(kept["costs"][action.name]) for action in Action}
        seconds = float(kept["chunk_seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sound = all(math.isfinite(figure) and figure > 0 for figure in (*costs.values(), seconds))
    return CostModel("measured", costs, seconds) if sound else None
