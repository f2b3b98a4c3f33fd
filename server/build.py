"""From settings to the engine: the one place that knows who generates."""

from __future__ import annotations

from dataclasses import replace

from ponderttt.adaptation.calibration import calibration_for
from ponderttt.engine.config import DEFAULT_MODEL_LEN, EngineConfig, served_name
from ponderttt.engine.core import EngineCore
from ponderttt.engine.loading import load_core
from ponderttt.engine.vllm.check import VllmMismatchError, check_fit, check_version, start_command
from ponderttt.engine.vllm.config import VllmConfig
from ponderttt.engine.vllm.errors import VllmError
from ponderttt.engine.vllm.generator import VllmGenerator
from ponderttt.errors import InvalidRequestError
from server.engine_config import engine_config
from server.settings import Settings


def build_core(settings: Settings, *, progress: bool = False) -> EngineCore:
    """The engine, its model loaded.

    Args:
        settings: of the server.
        progress: show a bar where something is downloaded.
    Raises:
        PonderError: the model, or a vLLM server that fits it, can't be had.
    """
    config = engine_config(settings)
    if settings.engine == "torch":
        return _load(settings, config, None, progress)
    # Before the model is loaded, which may take minutes.
    generator = _connect(settings, config)
    try:
        check_version(generator)
        core = _load(settings, _fit(config, generator), generator, progress)
        check_fit(core, generator)
    except BaseException:
        generator.close()
        raise
    return core


def _load(
    settings: Settings, config: EngineConfig, generator: VllmGenerator | None, progress: bool
) -> EngineCore:
    return load_core(
        settings.model,
        config=config,
        device=settings.device,
        dtype=settings.dtype,
        policy=settings.policy,
        generator=generator,
        progress=progress,
    )


def _connect(settings: Settings, config: EngineConfig) -> VllmGenerator:
    model = settings.model
    lora = config.lora or calibration_for(served_name(model)).lora
    command = start_command(model, lora.rank)
    if settings.vllm_url is None:
        raise InvalidRequestError(
            "vllm_url",
            "engine vllm needs the address of a vLLM server; give it with --vllm-url. One is "
            f"started by `{command}`",
        )
    file = settings.vllm_api_key_file
    try:
        return VllmGenerator(
            VllmConfig(
                url=settings.vllm_url,
                adapter_dir=settings.vllm_adapter_dir,
                timeout=settings.vllm_timeout,
                max_adapters=settings.vllm_max_adapters,
                api_key=file.read_text().strip() if file is not None else None,
            )
        )
    except VllmError as error:
        raise VllmMismatchError(
            f"{error}. Start one there by `{command}`, or give another address with --vllm-url"
        ) from error


def _fit(config: EngineConfig, generator: VllmGenerator) -> EngineConfig:
    """Ask vLLM for no longer texts than it takes."""
    theirs = generator.base_model.max_model_len
    ours = config.max_model_len or DEFAULT_MODEL_LEN
    return replace(config, max_model_len=min(ours, theirs)) if theirs else config
