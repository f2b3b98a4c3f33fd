"""How the cost of a decode step and of a write grows: with sessions, context, rank and blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.bench.driving import PhaseTimes, run, sampled
from ponderttt.bench.lab import Lab
from ponderttt.bench.spread import spread
from ponderttt.errors import InvalidRequestError
from ponderttt.fast_weights.layout import LoRAConfig

_SESSIONS, _CONTEXT = 4, 256


@dataclass(frozen=True, slots=True)
class Point:
    """What is measured together: sessions, each with so many tokens before it, and a LoRA."""

    sessions: int
    context: int
    lora: LoRAConfig


def curves(lab: Lab, repeats: int) -> dict[str, dict[int, Point]]:
    """Points by the value that varies, for every curve; contexts as far as the model's goes."""
    base = Point(lab.pick(_SESSIONS, 2), lab.pick(_CONTEXT, 64), lab.lora)
    limit = lab.decoder.config.max_positions - _new_tokens(lab, repeats)
    sessions = lab.pick((1, 2, 4, 8, 16, 32, 64), (1, 2))
    contexts = [c for c in lab.pick((256, 512, 1024, 2048, 4096), (64, 128)) if c <= limit]
    ranks = lab.pick((4, 8, 16, 32, 64), (4, 8))
    total = lab.decoder.config.num_layers
    layers = [n for n in lab.pick((1, 2, 4, 8, 16, 32, 64), (1, 2)) if n < total] + [total]
    return {
        "sessions": {n: replace(base, sessions=n) for n in sessions},
        "context": {n: replace(base, context=n) for n in contexts},
        "rank": {n: replace(base, lora=replace(base.lora, rank=n)) for n in ranks},
        "adaptive blocks": {n: replace(base, lora=replace(base.lora, layers=n)) for n in layers},
    }


def measure_curve(lab: Lab, name: str, repeats: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of a decode step and of a write at every point of a curve, as JSON has them."""
    points = curves(lab, repeats)[name]
    measured = []
    for value, point in points.items():
        tell(f"scaling with {name}: {value}")
        measured.append({name: value, **_measure(lab, name, value, point, repeats)})
    chunk = _chunk(lab)
    return {"varies": name, "chunk_size": chunk, "unit": "s", "points": measured}


def _chunk(lab: Lab) -> int:
    return lab.pick(64, 32)


def _new_tokens(lab: Lab, repeats: int) -> int:
    """Whole chunks, and the token with which the last of them is read to its end."""
    return _chunk(lab) * (repeats + 1) + 1


def _measure(
    lab: Lab, name: str, value: int, point: Point, repeats: int
) -> Mapping[str, dict[str, float]]:
    """All sessions learn what they generate: full chunks end in the same step, so they learn at
    once, and all tokens between are decode steps of as many sequences."""
    count, chunk = point.sessions, _chunk(lab)
    core = lab.core(
        lora=point.lora,
        max_num_seqs=count,
        adapter_slots=count,
        max_kv_tokens=1 << 24,
        max_batch_tokens=1 << 16,
        busy_batch_tokens=1 << 16,
    )
    core.observer = phases = PhaseTimes()
    stream = lab.stream(f"scaling/{name}/{value}")
    requests = []
    for index in range(count):
        core.sessions.create(f"session-{index}", TTTParams())
        ttt = TTTParams(
            session=f"session-{index}",
            action=Action.UPDATE_1,
            adapt_on="generated",
            chunk_size=chunk,
            when="inline",
        )
        prompt = stream.take(point.context)
        requests.append(sampled(prompt, _new_tokens(lab, repeats), ttt, seed=index))
    run(core, requests)
    return {
        "decode": asdict(spread(phases.seconds("decode", count)[chunk:])),
        # The first one warms up.
        "write": asdict(spread(list(_tail(phases.seconds("write", count), repeats)))),
    }


def _tail(values: list[float], repeats: int) -> Iterator[float]:
    if len(values) <= 1:
        raise InvalidRequestError("repeats", "no write was measured after the one that warms up")
    yield from values[1 : repeats + 1]
