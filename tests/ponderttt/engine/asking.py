"""Requests of the tests of the engine's parts, and an engine with sessions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.core import EngineCore
from ponderttt.engine.request import GenerateRequest
from tests.ponderttt.engine import harness

OFF = TTTParams(gate="off")
LONG = replace(harness.GREEDY, max_tokens=40)


def learn(session: str | None, **settings: Any) -> TTTParams:
    return TTTParams(**({"session": session, "gate": "fixed", "chunk_size": 32} | settings))


def make_core(directory: Path, *sessions: str, **settings: Any) -> EngineCore:
    core = harness.make_core(directory, **settings)
    for name in sessions:
        core.sessions.create(name, TTTParams())
    return core


def ask(directory: Path, number: int, length: int, ttt: TTTParams = OFF) -> GenerateRequest:
    return GenerateRequest(harness.text(directory, number, length), LONG, ttt)
