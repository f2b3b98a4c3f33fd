"""What is planned over what is known already, and what becomes of a request where that fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.request import AdaptRequest
from ponderttt.sessions.session import Session
from tests.ponderttt.engine import harness


def test_document_whose_weights_cannot_be_named_fails_alone(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = harness.make_core(tiny_llama_dir, prefix_cache_bytes=2**24)
    for name in ("s", "t"):
        core.sessions.create(name, TTTParams())
    document = harness.text(tiny_llama_dir, 0, 128)
    ttt = replace(harness.FIXED, session="s", action=Action.SKIP, chunk_size=64)
    # Read with weights that have learned nothing: it can be taken over by everybody.
    harness.generate(core, document, ttt=TTTParams(gate="off", session="s"))
    digest = core.sessions.digest

    def fail(session: Session) -> str:
        if session.owner == "s":
            raise MemoryError("no memory for the digest")
        return digest(session)

    monkeypatch.setattr(core.sessions, "digest", fail)
    broken, other = (
        harness.submit(core, AdaptRequest((document,), replace(ttt, session=name)))
        for name in ("s", "t")
    )
    harness.drain(core)
    assert isinstance(broken.error, MemoryError)
    assert other.report.digest == core.sessions.fresh_digest()
    assert other.events[-1].cached_tokens > 0  # type: ignore[union-attr]
    assert harness.holdings(core)[1:] == (0, {"s": 0, "t": 0})
