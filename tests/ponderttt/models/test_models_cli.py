"""`ponderttt models list` and `fetch`."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ponderttt.errors import ModelError
from ponderttt.models import hub
from ponderttt.models.cli import app


def test_list_without_any_model_says_how_to_fetch_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PONDERTTT_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "cached_model", lambda _: None)
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 0
    for name in ("smollm2-135m", "qwen2.5-coder-0.5b", "125m", "350m", "1b"):
        assert f"ponderttt models fetch {name}" in result.stdout
    assert "yes" not in result.stdout
    assert "Apache-2.0" in result.stdout


@pytest.mark.real_model
def test_list_with_a_model_shows_size_and_path(smollm2_dir: Path) -> None:
    result = CliRunner().invoke(app, ["list"])
    row = next(line for line in result.stdout.splitlines() if "smollm2-135m" in line)
    for cell in ("135 M", "yes", "0.54 GB", str(smollm2_dir)):
        assert cell in row


def test_fetch_of_a_directory_prints_it(tiny_llama_dir: Path) -> None:
    result = CliRunner().invoke(app, ["fetch", str(tiny_llama_dir)])
    assert result.exit_code == 0
    assert result.stdout == f"{tiny_llama_dir}\n"


def test_fetch_of_nothing_raises_what_the_command_line_prints() -> None:
    result = CliRunner().invoke(app, ["fetch", "./missing"])
    assert isinstance(result.exception, ModelError)
