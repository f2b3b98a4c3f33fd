"""PonderTTT: code completion that learns your code while it serves it.

    >>> from ponderttt import Engine, SamplingParams, TTTParams
    >>> engine = Engine.from_pretrained("smollm2-135m")
    >>> session = engine.session("my-repo")
    >>> reports = session.adapt(text)
    >>> engine.generate([prompt], SamplingParams(max_tokens=32), TTTParams(session="my-repo"))

The names below are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ponderttt.adaptation.actions import Action
    from ponderttt.adaptation.params import TTTParams
    from ponderttt.engine.config import EngineConfig
    from ponderttt.engine.engine import Engine
    from ponderttt.engine.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["Action", "Engine", "EngineConfig", "SamplingParams", "TTTParams", "__version__"]

_HOMES = {
    "Action": "ponderttt.adaptation.actions",
    "Engine": "ponderttt.engine.engine",
    "EngineConfig": "ponderttt.engine.config",
    "SamplingParams": "ponderttt.engine.sampling_params",
    "TTTParams": "ponderttt.adaptation.params",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ponderttt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
