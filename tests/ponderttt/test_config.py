"""Where the cache and the data lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from ponderttt.config import cache_dir, data_dir


def test_cache_dir_by_default_is_below_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PONDERTTT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_dir() == Path("/home/somebody/.cache/ponderttt")


def test_cache_dir_heeds_xdg_unless_it_is_relative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PONDERTTT_CACHE", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/mine")
    assert cache_dir() == Path("/var/cache/mine/ponderttt")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == Path("/home/somebody/.cache/ponderttt")


def test_cache_dir_chosen_by_the_user_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/mine")
    monkeypatch.setenv("PONDERTTT_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("PONDERTTT_CACHE", "~/models")
    assert cache_dir() == Path("/home/somebody/models")


def test_data_dir_is_the_platforms_unless_the_user_chose_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PONDERTTT_DATA", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert data_dir() == Path("/home/somebody/.local/share/ponderttt")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert data_dir() == Path("/home/somebody/.local/share/ponderttt")
    monkeypatch.setenv("XDG_DATA_HOME", "/var/data")
    assert data_dir() == Path("/var/data/ponderttt")
    monkeypatch.setattr("sys.platform", "darwin")
    assert data_dir() == Path("/home/somebody/Library/Application Support/ponderttt")
    monkeypatch.setenv("PONDERTTT_DATA", str(tmp_path))
    assert data_dir() == tmp_path
