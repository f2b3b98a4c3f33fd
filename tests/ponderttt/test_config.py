"""Where the cache lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from ponderttt.config import cache_dir


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
