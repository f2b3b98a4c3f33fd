"""Compiling: once, and with an answer where it can't be."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from ponderttt.models.native import library as module
from ponderttt.models.native.library import NativeUnavailableError, library, load, prebuild


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PONDERTTT_CACHE", str(tmp_path))
    return tmp_path / "native"


def test_sources_are_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load()
    (built,) = cache.iterdir()
    made = built.stat().st_mtime_ns

    def refuse(command: list[str], directory: str) -> None:
        raise AssertionError(f"{command} in {directory}")

    monkeypatch.setattr(module, "_run", refuse)
    load()
    assert [entry.stat().st_mtime_ns for entry in cache.iterdir()] == [made]


def test_another_cpu_has_kernels_of_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load()
    monkeypatch.setattr(module, "_cpu", lambda: "another")
    load()
    assert len(list(cache.iterdir())) == 2


def test_without_a_compiler_what_was_compiled_beforehand_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PACKAGE", tmp_path)
    built = prebuild()
    assert built.parent == tmp_path
    monkeypatch.setenv("CC", "no-such-compiler")
    assert load()._name == str(built)
    # Of other sources it is of no use.
    monkeypatch.setattr(module, "_texts", lambda: {"lanes.h": "other"})
    with pytest.raises(NativeUnavailableError, match="not installed"):
        load()


def test_a_library_without_a_function_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module._SIGNATURES, "ponderttt_missing", (None, []))
    with pytest.raises(NativeUnavailableError, match="has no ponderttt_missing"):
        load()


def test_the_compiler_may_have_arguments(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc -DHARMLESS")
    load()
    assert len(list(cache.iterdir())) == 1


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(NativeUnavailableError, match="no-such-compiler is not installed"):
        load()


def test_a_failing_compiler_is_quoted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = cache.parent / "broken"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no memory" >&2; exit 1; }\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    with pytest.raises(NativeUnavailableError, match="failed: no memory"):
        load()
    assert list(cache.iterdir()) == []


def test_a_damaged_library_is_compiled_anew(cache: Path) -> None:
    built = module._built(module._compiler())
    built.write_bytes(b"no library")
    load()
    assert built.stat().st_size > 1000
    assert list(cache.iterdir()) == [built]


def test_a_library_that_cannot_be_loaded_is_reported(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = cache.parent / "careless"
    script.write_text(
        '#!/bin/sh\n[ "$1" = -shared ] || exit 0\n'
        'while [ "$1" != -o ]; do shift; done\necho no > "$2"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    with pytest.raises(NativeUnavailableError, match="can't be loaded"):
        load()


def test_a_cache_that_cannot_be_used_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PONDERTTT_CACHE", str(tmp_path / "file"))
    with pytest.raises(NativeUnavailableError, match="Not a directory"):
        load()


def test_without_kernels_the_server_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.INFO):
        assert library.__wrapped__() is None
    assert "no-such-compiler is not installed" in caplog.text


def test_kernels_are_for_avx_512(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with caplog.at_level(logging.INFO):
        assert library.__wrapped__() is None
    assert "no AVX-512" in caplog.text
