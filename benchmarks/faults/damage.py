"""Random damage to stored sessions; with a tiny random model, whose files are checked alike."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

from benchmarks.faults.check import Result, check
from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import DamagedSessionError
from ponderttt.sessions.record import RECORD_FILE
from tests.ponderttt.sessions.servers import Place
from tests.ponderttt.sessions.stores import same


def damage(path: Path, kind: str, draws: random.Random) -> None:
    """Change a file for certain: the same bytes would be no damage."""
    data = bytearray(path.read_bytes())
    at = draws.randrange(len(data))
    match kind:
        case "bit":
            data[at] ^= 1 << draws.randrange(8)
        case "truncated":
            del data[at:]
        case "zeros":
            while not any(data[at : at + 64]):
                at = draws.randrange(len(data))
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        case "removed":
            path.unlink()
            return
    path.write_bytes(data)


def damaged(tiny: Path, scratch: Path, seed: int, count: int = 300) -> Result:
    """Damage the newest of three versions, then, for a sixth as many sessions, all three."""
    draws, tally = random.Random(seed), Counter[str]()
    server = Place(tiny, str(scratch / "whole")).start()
    server.sessions.create("repo", TTTParams())
    states = {}
    for version in (1, 2, 3):
        states[version] = server.teach("repo")
        server.sessions.flush()
    server.sessions.close()
    kinds: Counter[str] = Counter()
    for number in range(count + count // 6):
        root = scratch / "damaged"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(scratch / "whole", root)
        spoilt = (3,) if number < count else (1, 2, 3)
        for version in spoilt:
            files = sorted((root / "repo" / f"v{version:08d}").iterdir())
            # Without its record a version was never committed, whoever removed it.
            kind = draws.choice(("bit", "truncated", "zeros", "removed"))
            kinds[kind] += 1
            damage(draws.choice([f for f in files if (kind, f.name) != ("removed", RECORD_FILE)]),
                   kind, draws)  # fmt: skip
        again = Place(tiny, str(root)).start()
        try:
            state = again.sessions.state(again.sessions.warm("repo"))
            tally["found"] += again.stats.recoveries
            tally["back at the version before"] += spoilt == (3,) and same(state, states[2])
            tally["wrong weights"] += not (spoilt == (3,) and same(state, states[2]))
        except DamagedSessionError:
            tally["refused" if spoilt == (1, 2, 3) else "lost"] += 1
        again.sessions.close()
    whole = {"newest damaged": count, "all damaged": count // 6, "kinds": dict(kinds)}
    keys = ("found", "back at the version before", "refused", "wrong weights", "lost")
    check(tally["found"] == count and tally["refused"] == count // 6, tally)
    check(tally["wrong weights"] == tally["lost"] == 0, tally)
    return whole | {key: tally[key] for key in keys}
