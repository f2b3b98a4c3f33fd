"""`ponderttt bench engine`, from options to files."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ponderttt.bench import group
from ponderttt.bench.cli import engine
from ponderttt.bench.ratios import PLACES
from ponderttt.bench.workloads import ALL
from ponderttt.errors import InvalidRequestError

APP = typer.Typer()
APP.command()(engine)


@pytest.fixture
def arguments(tiny_llama_dir: Path, tmp_path: Path) -> list[str]:
    return [
        "--model", str(tiny_llama_dir), "--threads", "1", "--repeats", "1", "--quick",
        "--output", str(tmp_path / "out"),
    ]  # fmt: skip


def test_run_leaves_json_table_and_plots(arguments: list[str], tmp_path: Path) -> None:
    flat = tmp_path / "deep" / "flat.json"
    options = ["--only", "write-8", "--only", "decode-16", "--json", str(flat)]
    result = CliRunner().invoke(APP, [*arguments, *options])
    assert result.exit_code == 0, result.output
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"bench.json", "bench.md", "ratios.png"}
    assert (tmp_path / "out" / "bench.md").read_text() in result.stdout
    assert "ponderttt.bench.vllm_env" in result.stdout
    kept = json.loads((tmp_path / "out" / "bench.json").read_text())
    # In the table's order, whatever that of the options.
    assert list(kept["rows"]) == ["decode-16", "write-8"]
    found = json.loads(flat.read_text())
    (comparison, _) = kept["rows"]["write-8"]["comparisons"]
    assert found["ratios"]["write_8_batched_vs_single"] == comparison["ratio"]["median"]
    assert found["ratios"]["decode_16_vs_vllm"] is None
    assert found["rows"] == kept["rows"]


def test_every_ratio_is_a_comparison_of_the_table() -> None:
    compared = {(w.name, c.ours, c.theirs) for w in ALL for c in w.comparisons}
    assert set(PLACES.values()) <= compared


def test_resume_keeps_what_is_there(arguments: list[str], tmp_path: Path) -> None:
    CliRunner().invoke(APP, [*arguments, "--only", "write-8"])
    path = tmp_path / "out" / "bench.json"
    before = json.loads(path.read_text())["rows"]["write-8"]
    again = [*arguments, "--resume", "--only", "write-8", "--only", "idle-session"]
    result = CliRunner().invoke(APP, again)
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["rows"]
    assert rows["write-8"] == before
    assert set(rows) == {"write-8", "idle-session"}


def test_row_that_does_not_exist_is_refused_before_anything_runs(arguments: list[str]) -> None:
    result = CliRunner().invoke(APP, [*arguments, "--only", "nothing"])
    assert isinstance(result.exception, InvalidRequestError)
    assert "decode-1" in str(result.exception)


def test_list_names_every_row() -> None:
    result = CliRunner().invoke(APP, ["--list"])
    assert result.stdout.split() == [workload.name for workload in ALL]


def test_group_has_what_the_entry_points_name(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("engine", "ponderttt.bench.cli:engine", group.GROUP),
        EntryPoint("absent", "no_such_module:app", group.GROUP),
    ]
    monkeypatch.setattr(group, "entry_points", lambda *, group: points)
    result = CliRunner().invoke(group.build_group(), ["--help"])
    assert result.exit_code == 0
    assert "engine" in result.stdout
    assert "absent" in result.stdout


def test_project_names_the_group_and_the_command() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    points = tomllib.loads(text)["project"]["entry-points"]
    assert points["ponderttt.commands"]["bench"] == "ponderttt.bench.group:app"
    assert points[group.GROUP]["engine"] == "ponderttt.bench.cli:engine"


def test_command_modules_import_no_torch() -> None:
    code = (
        "import sys, ponderttt.bench.group, ponderttt.bench.cli\n"
        "slow = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(str(slow) if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
