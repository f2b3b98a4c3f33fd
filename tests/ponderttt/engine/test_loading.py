"""From a directory to an engine: its name, its limits, its policy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ponderttt.adaptation.features import FEATURE_NAMES
from ponderttt.adaptation.params import TTTParams
from ponderttt.adaptation.policy import PolicyMetadata, PolicyNetwork, save_policy
from ponderttt.engine.config import EngineConfig
from ponderttt.engine.loading import load_core
from ponderttt.errors import PolicyFormatError
from tests.ponderttt.engine import harness


def _policy(directory: Path, name: str) -> Path:
    width = len(FEATURE_NAMES)
    metadata = PolicyMetadata(
        name, 32, "nominal", (3.0,), (0.0,) * width, (1.0,) * width, hidden_sizes=(4,)
    )
    save_policy(directory, PolicyNetwork((4,)), metadata)
    return directory


def test_engine_from_a_directory_has_its_name_and_limits(tiny_llama_dir: Path) -> None:
    config = EngineConfig(measure_costs=False, max_model_len=300)
    core = load_core(str(tiny_llama_dir), config=config)
    assert core.model_name == tiny_llama_dir.name
    assert core.max_model_len == 300
    assert core.config is config
    assert core.default_gate == "threshold"
    assert set(core.costs) == {"nominal", "measured"}


def test_engine_from_the_current_directory_has_a_name(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_llama_dir)
    core = load_core(os.curdir, config=EngineConfig(measure_costs=False))
    assert core.model_name == tiny_llama_dir.name


def test_engine_with_a_policy_uses_it_by_default(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = EngineConfig(measure_costs=False)
    core = load_core(
        str(tiny_llama_dir), config=config, policy=_policy(tmp_path, tiny_llama_dir.name)
    )
    assert core.default_gate == "policy"
    got = harness.generate(core, harness.text(tiny_llama_dir, 0, 64), ttt=TTTParams(chunk_size=32))
    assert got.report.gate == "policy"
    assert {r.reason for r in got.chunks} <= {"policy", "budget"}


def test_engine_with_another_models_policy_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = EngineConfig(measure_costs=False)
    with pytest.raises(PolicyFormatError, match="base_model is 'other'"):
        load_core(str(tiny_llama_dir), config=config, policy=_policy(tmp_path, "other"))
