"""What keeping sessions costs: copying a state, committing it, reading it back.

    .venv/bin/python benchmarks/session_store.py --model smollm2-135m --json out.json

The copy is all that the engine's thread does; commits and loads run in threads of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.config import served_name
from ponderttt.fast_weights.bank import AdapterBank, AdapterState, StepTag
from ponderttt.fast_weights.layout import AdapterLayout, LoRAConfig
from ponderttt.models import store as models
from ponderttt.models.checkpoint import load_decoder
from ponderttt.sessions.codec import StateCodec
from ponderttt.sessions.config import StoreConfig
from ponderttt.sessions.files import open_files
from ponderttt.sessions.manager import SessionManager
from ponderttt.sessions.session import Session
from ponderttt.sessions.store import SessionStore


def seconds(function: Callable[[], object]) -> float:
    """Wall time of a call."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def learn(bank: AdapterBank, sessions: SessionManager, session: Session) -> None:
    """Commit a new version to the bank, as an update would."""
    sessions.acquire(session)
    noise = torch.randn(3, bank.layout.size)
    state = AdapterState(
        bank.fresh_weights + 1e-3 * noise[0], noise[1], noise[2].abs(), session.version + 1
    )
    tag = StepTag(session.slot, session.owner, session.version, "WRITE")
    session.version = bank.commit(tag, state)
    session.chunks += 1
    session.remember(f"{session.version:032d}", 256)
    sessions.release(session)


def measure(model: str, rank: int, directory: str, repeats: int) -> dict[str, object]:
    """Medians and maxima, in milliseconds."""
    decoder = load_decoder(models.resolve(model, progress=False))
    layout = AdapterLayout(decoder, LoRAConfig(rank=rank, alpha=2.0 * rank))
    bank = AdapterBank(layout, 2, torch.device("cpu"), torch.float32)
    codec = StateCodec(layout, bank.fresh_weights, served_name(model), max_norm=1e6)
    sessions = SessionManager(bank, 4)
    config = StoreConfig(directory, write_delay=0.0)
    sessions.attach(SessionStore(open_files(directory), codec, 3), config)
    attached = sessions._attached
    assert attached is not None
    session = sessions.create("repo", TTTParams())
    sessions.flush()
    times: dict[str, list[float]] = {
        name: [] for name in ("copy", "commit", "commit_record", "load")
    }
    for _ in range(repeats):
        learn(bank, sessions, session)
        times["copy"].append(seconds(lambda: sessions.state(session)))
        times["commit"].append(seconds(sessions.flush))
        session.chunks += 1
        times["commit_record"].append(seconds(sessions.flush))
        attached.upkeep.put_away(session)
        times["load"].append(seconds(lambda: sessions.warm("repo")))
    sessions.close()
    return {
        "model": served_name(model),
        "rank": rank,
        "bytes_per_session": 12 * layout.size,
        "repeats": repeats,
        **{f"{name}_ms_median": 1e3 * statistics.median(each) for name, each in times.items()},
        **{f"{name}_ms_max": 1e3 * max(each) for name, each in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--directory", help="of the store; by default a temporary one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        result = measure(options.model, options.rank, directory, options.repeats)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
