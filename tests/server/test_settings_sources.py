"""Settings: command line over environment over file over default."""

from __future__ import annotations

from pathlib import Path

import pytest

from ponderttt.errors import InvalidRequestError
from server.settings import ENV_PREFIX, Settings
from server.settings_sources import load_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting from outside."""
    for name in [*Settings.model_fields, "config"]:
        monkeypatch.delenv(f"{ENV_PREFIX}{name.upper()}", raising=False)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """A file that sets three things."""
    path = tmp_path / "ponderttt.toml"
    path.write_text('port = 1111\nbudget = 3.5\ngate = "random"\n')
    return path


def test_defaults_hold_where_nothing_is_said() -> None:
    settings = load_settings()
    assert (settings.model, settings.host, settings.port) == (
        "qwen2.5-coder-0.5b", "127.0.0.1", 8000,
    )  # fmt: skip
    assert settings.max_body_bytes == 8 * 1024 * 1024


def test_each_source_wins_over_the_one_below(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(config=toml).port == 1111
    monkeypatch.setenv("PONDERTTT_PORT", "2222")
    monkeypatch.setenv("PONDERTTT_BUDGET", "4")
    settings = load_settings({"port": 3333}, toml)
    assert (settings.port, settings.budget, settings.gate) == (3333, 4.0, "random")


def test_environment_may_name_the_file(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PONDERTTT_CONFIG", str(toml))
    assert load_settings().port == 1111


def test_other_variables_with_our_prefix_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_settings().model_dump()
    monkeypatch.setenv("PONDERTTT_CACHE", "/tmp/x")
    assert load_settings().model_dump() == before


@pytest.mark.parametrize(
    ("text", "param", "tells"),
    [
        ("prot = 1", "prot", "port"),
        ("budget = 0.5", "budget", "1"),
        ("budget = nan", "budget", "finite"),
        ("port = 70000", "port", "65535"),
        ('gate = "magic"', "gate", "threshold"),
        ('engine = "jax"', "engine", "torch"),
        ("max_model_len = 3", "max_model_len", "16"),
        ('policy = "/no/such/policy"', "policy", "policy.json"),
        ('calibration = "/no/such.json"', "calibration", "not a file"),
        ("port = ", "config", "TOML"),
        ("[server]\nport = 1", "server", "unknown"),
    ],
)
def test_wrong_file_is_refused_with_the_key(
    tmp_path: Path, text: str, param: str, tells: str
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match=param) as caught:
        load_settings(config=path)
    assert caught.value.param == param
    assert tells in str(caught.value)


def test_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"nowhere\.toml"):
        load_settings(config=tmp_path / "nowhere.toml")


def test_wrong_environment_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PONDERTTT_MAX_WAITING", "many")
    with pytest.raises(InvalidRequestError, match="PONDERTTT_MAX_WAITING"):
        load_settings()
