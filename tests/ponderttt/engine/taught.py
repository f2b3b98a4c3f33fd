"""A session that has learned one text, and prompts of that and of another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.core import EngineCore
from ponderttt.engine.request import GenerateRequest
from tests.ponderttt.engine import harness

#: Taught to the session; a prompt of it is predicted better by what was learned, number 5 worse.
LEARNED, OTHER = 3, 5
READ = TTTParams(session="s", gate="off")


def taught(directory: Path, **settings: Any) -> EngineCore:
    core = harness.make_core(directory, **settings)
    core.sessions.create("s", TTTParams())
    document = harness.text(directory, LEARNED, 128)
    harness.adapt(core, document, ttt=replace(harness.FIXED, session="s"))
    return core


def ask(
    directory: Path, number: int, ttt: TTTParams | None = READ, length: int = 90, **sampling: Any
) -> GenerateRequest:
    prompt = harness.text(directory, number, length)
    return GenerateRequest(prompt, replace(harness.GREEDY, **sampling), ttt)
