"""What `--compile` costs at start-up and what it gives: compiled and not, in turn in one process.

    .venv/bin/python benchmarks/compile.py smollm2-135m \
        --json benchmarks/results/compile_smollm2-135m.json

In fp32 on the CPU, medians. Start-up is that of two processes of their own, the first with an empty
cache directory of inductor's, the second with what the first left there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.calibration import calibration_for
from ponderttt.adaptation.observe import ChunkRead, score
from ponderttt.adaptation.update import Write, Writer, probabilities_fit, top_gradient
from ponderttt.engine.config import served_name
from ponderttt.fast_weights.bank import AdapterBank, StepTag
from ponderttt.fast_weights.layout import AdapterLayout
from ponderttt.models import store
from ponderttt.models.checkpoint import load_decoder
from ponderttt.models.decoder import Decoder
from ponderttt.models.kv_cache import KVCache

_CHUNK = 256
_STREAMS = (1, 16)
# A step takes hundredths of a second, a chunk half of one.
_STEPS_PER_ROUND = 3


class Work:
    """One decoder with a chunk read, on which the same work can be repeated.

    Args:
        decoder: compiled or not.
        name: under which the calibration is found.
    """

    def __init__(self, decoder: Decoder, name: str) -> None:
        self.decoder = decoder
        calibration = calibration_for(name)
        self._layout = AdapterLayout(decoder, calibration.lora)
        self._bank = AdapterBank(self._layout, 1, decoder.device, decoder.dtype)
        self._writer = Writer(decoder, self._bank, calibration.rule)
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(decoder.config.vocab_size, (_CHUNK,), generator=generator)
        self._caches = [decoder.new_cache(_CHUNK + 1) for _ in range(max(_STREAMS))]
        shape = (_CHUNK, decoder.config.hidden_size)
        self._boundary, self._final = torch.empty(shape), torch.empty(shape)
        for cache in self._caches:
            self._read(cache)
        with torch.inference_mode():
            keep = probabilities_fit(decoder, _CHUNK)
            chunk = ChunkRead(self._ids, 0, _CHUNK, self._boundary, self._final, self._caches[0])
            scores = score(decoder, chunk, keep=keep)
            self._top = top_gradient(scores, decoder.head, self._ids[1:])

    def chunk(self) -> None:
        """Forward of a chunk from the first position on, up to the last norm."""
        self._read(self._caches[0])

    @torch.inference_mode()
    def step(self, streams: int) -> Tensor:
        """[streams, V] logits: one token of each stream, at the position after a chunk."""
        decoder = self.decoder
        places = [(cache, _CHUNK, 1) for cache in self._caches[:streams]]
        batch = decoder.batch(places, decodes=True)
        x = decoder.embed(self._ids[:streams], batch)
        x = decoder.run(x, 0, decoder.config.num_layers, batch)
        return decoder.logits(decoder.normed(x))

    def update(self) -> None:
        """UPDATE_1 on the chunk: a gradient step and its judgement, without the read before."""
        write = Write(
            tag=StepTag(0, None, 0, "WRITE"),
            action=Action.UPDATE_1,
            cache=self._caches[0],
            start=0,
            boundary=self._boundary[:-1],
            targets=self._ids[1:],
            staged=self._bank.fresh_state(),
            top=self._top,
        )
        while not write.finished:
            self._writer.step([write])

    @torch.inference_mode()
    def _read(self, cache: KVCache) -> None:
        decoder, first = self.decoder, self._layout.first_layer
        batch = decoder.batch([(cache, 0, _CHUNK)])
        x = decoder.run(decoder.embed(self._ids, batch), 0, first, batch)
        self._boundary.copy_(x)
        x = decoder.run(x, first, decoder.config.num_layers, batch)
        self._final.copy_(decoder.normed(x))


def startup_seconds(directory: Path, threads: int, cache: Path) -> dict[str, float]:
    """Seconds of loading and of compiling in a process of its own, by the cache as it is."""
    command = [sys.executable, __file__, str(directory), "--startup", "--threads", str(threads)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def start(directory: Path) -> dict[str, float]:
    """Load, then compile; the seconds of each."""
    begun = time.perf_counter()
    decoder = load_decoder(directory)
    loaded = time.perf_counter()
    decoder.compile()
    return {"load": loaded - begun, "compile": time.perf_counter() - loaded}


def in_turn(
    works: dict[str, Callable[[], object]], rounds: int, repeats: int = 1
) -> dict[str, dict[str, float]]:
    """Median, least and most seconds of each piece of work, after a round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            begun = time.perf_counter()
            for _ in range(repeats):
                work()
            if number:
                seconds[name].append((time.perf_counter() - begun) / repeats)
    return {
        name: {"median": statistics.median(s), "min": min(s), "max": max(s)}
        for name, s in seconds.items()
    }


def measure(model: str, threads: int, rounds: int) -> dict[str, object]:
    """All figures of one model."""
    directory, name = store.resolve(model, progress=False), served_name(model)
    with tempfile.TemporaryDirectory() as cache:
        empty, filled = (startup_seconds(directory, threads, Path(cache)) for _ in range(2))
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        compiled = load_decoder(directory, compiled=True)
        plain = load_decoder(directory)
        works = {"plain": Work(plain, name), "compiled": Work(compiled, name)}
        figures = {
            f"decode_{streams}": in_turn(
                {kind: partial(w.step, streams) for kind, w in works.items()},
                3 * rounds,
                _STEPS_PER_ROUND,
            )
            for streams in _STREAMS
        }
        figures["chunk_forward"] = in_turn({k: w.chunk for k, w in works.items()}, rounds)
        figures["update_1"] = in_turn({k: w.update for k, w in works.items()}, rounds)
        logits = [work.step(max(_STREAMS)) for work in works.values()]
    return {
        "model": name,
        "threads": threads,
        "rounds": rounds,
        "chunk": _CHUNK,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "startup_seconds": {"empty_cache": empty, "filled_cache": filled},
        "seconds": figures,
        "largest_logit": float(logits[0].abs().max()),
        "largest_difference_of_logits": float((logits[0] - logits[1]).abs().max()),
    }


def _table(row: dict[str, object]) -> Table:
    table = Table("", "plain", "compiled", "plain ÷ compiled")
    seconds = row["seconds"]
    assert isinstance(seconds, dict)
    for name, kinds in seconds.items():
        plain, compiled = (kinds[kind]["median"] for kind in ("plain", "compiled"))
        table.add_row(
            name, f"{1e3 * plain:.1f} ms", f"{1e3 * compiled:.1f} ms", f"{plain / compiled:.2f}"
        )
    return table


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="name or directory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="of a chunk; three times of a step")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--startup", action="store_true", help="only start, and print the seconds")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.startup:
        print(json.dumps(start(Path(given.model))))
        return
    row = measure(given.model, given.threads, given.rounds)
    Console().print(_table(row))
    Console().print(row["startup_seconds"])
    if given.json:
        given.json.write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    main()
