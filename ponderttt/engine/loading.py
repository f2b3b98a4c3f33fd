"""From a model's name to an engine: fetches and loads what there is to it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ponderttt.adaptation.calibration import calibration_for
from ponderttt.adaptation.policy import load_policy
from ponderttt.engine.config import EngineConfig, served_name
from ponderttt.engine.core import EngineCore
from ponderttt.engine.generator import Generator
from ponderttt.engine.observer import EngineObserver
from ponderttt.models import store
from ponderttt.models.checkpoint import load_decoder, torch_device, torch_dtype
from ponderttt.models.tokenizer import Tokenizer


def load_core(
    model: str,
    *,
    config: EngineConfig | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    policy: Path | None = None,
    observer: EngineObserver | None = None,
    generator: Generator | None = None,
    progress: bool = False,
) -> EngineCore:
    """Fetch (if need be) and load a model, its policy and its update rule.

    Args:
        model: embedded name, hub name or directory.
        config: None: the defaults.
        device, dtype: torch's names.
        policy: a policy directory; None: the one shipped for the model, if there is one.
        observer: hears of everything.
        generator: draws the tokens elsewhere; None: here.
        progress: show a bar where something is downloaded.
    Raises:
        ModelError: the model cannot be had, or not on this device, or not compiled.
        PolicyFormatError: the policy is damaged or for something else.
    """
    config = config or EngineConfig()
    path = store.resolve(model, progress=progress)
    name = served_name(model)
    decoder = load_decoder(
        path,
        torch_device(device),
        torch_dtype(dtype),
        packed=config.packed_weights,
        native=config.native_kernels,
        compiled=config.compile,
    )
    shipped = files("ponderttt") / "policies" / name
    if policy is None and shipped.is_dir():
        policy = Path(str(shipped))
    core = EngineCore(
        decoder,
        Tokenizer.from_dir(path),
        name,
        config,
        config.rule or calibration_for(name).rule,
        load_policy(policy, name) if policy is not None else None,
        generator,
    )
    if config.measure_costs:
        core.measure_costs(config.ttt.chunk_size)
    if observer is not None:
        core.observer = observer
    return core
