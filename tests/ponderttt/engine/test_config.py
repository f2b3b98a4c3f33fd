"""Settings of the engine are checked when they are made."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.calibration import calibration_for
from ponderttt.adaptation.rules import UpdateRule
from ponderttt.engine.config import EngineConfig, TTTDefaults, served_name
from ponderttt.engine.core import EngineCore
from ponderttt.engine.loading import load_core
from ponderttt.errors import InvalidRequestError
from ponderttt.fast_weights.layout import LoRAConfig
from tests.ponderttt.engine import harness

COUNTS = (
    "max_num_seqs", "max_waiting", "max_kv_tokens", "max_batch_tokens", "busy_batch_tokens",
    "adapter_slots", "max_sessions",
)  # fmt: skip


def make_config(**settings: Any) -> EngineConfig:
    return EngineConfig(**settings)


def test_config_with_nothing_given_is_the_documented_one() -> None:
    config = EngineConfig()
    assert (config.max_num_seqs, config.max_waiting, config.adapter_slots) == (16, 256, 32)
    assert config.ttt == TTTDefaults(None, Action.UPDATE_1, 2.0, "nominal", 256, "prompt", "inline")


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1])
def test_config_with_a_count_below_one_names_it(name: str, value: int) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make_config(**{name: value})
    assert caught.value.param == name
    assert "below 1" in str(caught.value)


@pytest.mark.parametrize("name", COUNTS)
def test_config_with_a_count_of_one_is_taken(name: str) -> None:
    assert getattr(make_config(**{"busy_batch_tokens": 1, name: 1}), name) == 1


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan])
def test_config_in_which_nobody_may_wait_is_refused(seconds: float) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        EngineConfig(max_wait_seconds=seconds)
    assert caught.value.param == "max_wait_seconds"


@pytest.mark.parametrize(
    ("settings", "places", "positions"),
    [({}, 8, 32768), ({"max_num_seqs": 1}, 1, 32768), ({"adapter_slots": 4}, 2, 32768),
     ({"max_kv_tokens": 1}, 8, 1)],
)  # fmt: skip
def test_documents_get_half_of_everything_and_never_nothing(
    settings: dict[str, int], places: int, positions: int
) -> None:
    config = make_config(**settings)
    assert (config.max_adapting, config.max_adapting_kv_tokens) == (places, positions)


def test_config_with_a_negative_prefix_cache_is_refused_and_none_is_taken() -> None:
    assert EngineConfig().prefix_cache_bytes == 1 << 30
    assert EngineConfig(prefix_cache_bytes=0).prefix_cache_bytes == 0
    with pytest.raises(InvalidRequestError, match="0 turns it off") as caught:
        EngineConfig(prefix_cache_bytes=-1)
    assert caught.value.param == "prefix_cache_bytes"


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 2.0, math.nan])
def test_config_with_a_decode_share_that_starves_somebody_is_refused(share: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"outside \(0, 1\)") as caught:
        EngineConfig(decode_share=share)
    assert caught.value.param == "decode_share"


@pytest.mark.parametrize("length", [0, 15, -4])
def test_config_with_a_context_below_a_chunk_is_refused(length: int) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        EngineConfig(max_model_len=length)
    assert caught.value.param == "max_model_len"


def test_config_with_busy_phases_larger_than_idle_ones_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        EngineConfig(max_batch_tokens=100, busy_batch_tokens=101)
    assert caught.value.param == "busy_batch_tokens"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gate", "magic"),
        ("action", "UPDATE_1"),
        ("budget", 0.5),
        ("budget", math.nan),
        ("cost_model", "seconds"),
        ("chunk_size", 8),
        ("chunk_size", 4096),
        ("adapt_on", "nothing"),
        ("when", "tomorrow"),
    ],
)
def test_defaults_with_a_bad_value_are_refused_as_in_a_request(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        TTTDefaults(**{name: value})
    assert caught.value.param == f"ttt.{name}"


def test_defaults_may_name_an_action_beside_any_gate() -> None:
    # It is the action of the requests that ask for gate `fixed`.
    assert TTTDefaults(gate="threshold", action=Action.UPDATE_2).action is Action.UPDATE_2
    assert TTTDefaults(when="background").when == "background"


def test_config_once_made_cannot_be_changed() -> None:
    config = EngineConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_num_seqs = 99  # type: ignore[misc]


def test_name_is_that_of_the_directory_or_the_one_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert served_name(str(tmp_path / "mine")) == served_name("~/mine/") == "mine"
    monkeypatch.chdir(tmp_path / "mine")
    assert served_name(".") == "mine"
    assert served_name("somebody/else") == "somebody/else"


def test_engine_without_a_shape_or_rule_takes_those_of_its_model(tiny_llama_dir: Path) -> None:
    config = EngineConfig(measure_costs=False)
    core = load_core(str(tiny_llama_dir), config=config)
    assert (core.bank.layout.config, core.writer.rule) == (LoRAConfig(), UpdateRule())
    decoder, tokenizer = harness.load(tiny_llama_dir)
    calibrated = calibration_for("smollm2-135m")
    core = EngineCore(decoder, tokenizer, "smollm2-135m", config, calibrated.rule)
    assert core.bank.layout.config == calibrated.lora


def test_engine_with_a_shape_and_rule_keeps_them(tiny_llama_dir: Path) -> None:
    lora, rule = LoRAConfig(rank=3, layers=1), UpdateRule(optimizer="sgd")
    config = EngineConfig(lora=lora, rule=rule, measure_costs=False)
    core = load_core(str(tiny_llama_dir), config=config)
    assert (core.bank.layout.config, core.writer.rule) == (lora, rule)
