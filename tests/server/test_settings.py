"""What can be set, what follows from it, and how it reaches the engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.calibration import calibration_for
from ponderttt.adaptation.rules import UpdateRule
from ponderttt.errors import InvalidRequestError
from ponderttt.fast_weights.layout import LoRAConfig
from ponderttt.sessions.config import StoreConfig
from server.engine_config import engine_config
from server.settings import ENV_PREFIX, Settings
from server.settings_sources import load_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting from outside."""
    for name in [*Settings.model_fields, "config"]:
        monkeypatch.delenv(f"{ENV_PREFIX}{name.upper()}", raising=False)


def test_every_setting_is_described_under_a_heading() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert isinstance(field.json_schema_extra, dict), name


def test_settings_reach_the_engine() -> None:
    settings = Settings(
        gate="fixed", action="UPDATE_2", budget=3.0, cost_model="measured", chunk_size=64,
        adapt_on="both", when="background", learning_rate=0.02, rank=4, alpha=32.0,
        adaptive_layers=2, targets="q_proj, v_proj", max_model_len=100, max_num_seqs=3,
        max_waiting=4, adapter_slots=5, max_sessions=6, measure_costs=False,
        prefix_cache_bytes=7, packed_weights=False, native_kernels=False, compile=True,
        max_wait_seconds=8.5,
    )  # fmt: skip
    config = engine_config(settings)
    ttt = config.ttt
    assert (ttt.gate, ttt.action, ttt.budget) == ("fixed", Action.UPDATE_2, 3.0)
    assert (ttt.cost_model, ttt.chunk_size, ttt.adapt_on, ttt.when) == (
        "measured", 64, "both", "background",
    )  # fmt: skip
    assert config.rule is not None
    assert config.rule.learning_rate == 0.02
    lora = config.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.layers, lora.targets) == (4, 32.0, 2, ("q_proj", "v_proj"))
    assert (config.max_model_len, config.max_num_seqs, config.max_waiting) == (100, 3, 4)
    assert (config.adapter_slots, config.max_sessions, config.measure_costs) == (5, 6, False)
    assert config.prefix_cache_bytes == 7
    assert not config.packed_weights
    assert not config.native_kernels
    assert config.compile
    assert config.max_wait_seconds == 8.5


def test_limits_of_a_key_are_half_of_the_servers_unless_given() -> None:
    settings = Settings(max_waiting=9, max_sessions=7)
    assert (settings.waiting_per_key, settings.sessions_per_key) == (4, 3)
    settings = Settings(max_waiting=1, max_sessions=1)
    assert (settings.waiting_per_key, settings.sessions_per_key) == (1, 1)
    settings = Settings(max_waiting_per_key=5, max_sessions_per_key=0)
    assert (settings.waiting_per_key, settings.sessions_per_key) == (5, 0)


def test_sessions_are_kept_below_the_users_data_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PONDERTTT_DATA", str(tmp_path))
    store = engine_config(Settings(model="somebody/model")).store
    assert store == StoreConfig(str(tmp_path / "sessions" / "somebody--model"))


def test_session_settings_reach_the_store() -> None:
    settings = Settings(
        sessions="s3://bucket/place", session_versions=5, session_write_delay=0.5,
        session_idle_seconds=60, session_ttl=3600, ram_sessions=7,
    )  # fmt: skip
    assert engine_config(settings).store == StoreConfig(
        "s3://bucket/place", keep_versions=5, write_delay=0.5, ram_sessions=7, idle_seconds=60,
        ttl=3600,
    )  # fmt: skip
    assert engine_config(Settings(sessions="memory")).store is None


def test_model_brings_its_calibration() -> None:
    config = engine_config(Settings(model="smollm2-135m"))
    calibrated = calibration_for("smollm2-135m")
    assert (config.lora, config.rule) == (calibrated.lora, calibrated.rule)
    other = engine_config(Settings(model="somebody/else"))
    assert (other.lora, other.rule) == (LoRAConfig(), UpdateRule())


def test_name_on_the_hub_is_not_that_of_an_embedded_model() -> None:
    config = engine_config(Settings(model="somebody/smollm2-135m", learning_rate=0.5))
    assert config.rule == UpdateRule(learning_rate=0.5)


def test_calibration_keeps_all_but_what_is_given() -> None:
    calibrated = calibration_for("smollm2-135m")
    config = engine_config(Settings(model="smollm2-135m", learning_rate=0.5, rank=3, targets="all"))
    assert config.rule == replace(calibrated.rule, learning_rate=0.5)
    assert config.lora == replace(calibrated.lora, rank=3, targets="all")
    config = engine_config(Settings(model="smollm2-135m", alpha=5.0, adaptive_layers=2))
    assert config.rule == calibrated.rule
    assert config.lora == replace(calibrated.lora, alpha=5.0, layers=2)


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    """A file of somebody's own."""
    path = tmp_path / "mine.json"
    path.write_text(
        '{"lora": {"rank": 5, "targets": ["up_proj"]}, '
        '"rule": {"optimizer": "sgd", "learning_rate": 0.25}}'
    )
    return path


def test_calibration_from_a_file_wins_over_the_models_and_options_over_both(
    calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PONDERTTT_CALIBRATION", str(calibration))
    config = engine_config(load_settings({"model": "smollm2-135m"}))
    assert config.lora == LoRAConfig(rank=5, targets=("up_proj",))
    assert config.rule == UpdateRule(optimizer="sgd", learning_rate=0.25)
    config = engine_config(load_settings({"model": "smollm2-135m", "rank": 6}))
    assert config.lora == LoRAConfig(rank=6, targets=("up_proj",))
    assert config.rule == UpdateRule(optimizer="sgd", learning_rate=0.25)


def test_wrong_calibration_is_refused_with_file_and_field(calibration: Path) -> None:
    calibration.write_text('{"lora": {}, "rule": {"optimizer": "lion"}}')
    with pytest.raises(InvalidRequestError, match=r"mine\.json.*optimizer: 'lion'") as caught:
        engine_config(Settings(calibration=calibration))
    assert caught.value.param == "calibration"
