"""`ponderttt train`, and the modules that run as commands of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ponderttt import cli
from tests.training import tiny
from training.cli import app
from training.live_results import read_results
from training.policy import _arguments

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("collect", "policy", "baseline", "oracle", "evaluate", "ablate", "calibrate")


def test_help_names_every_command_and_every_command_has_help(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Options must not be wrapped away.
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(app, ["--help"])
    assert done.exit_code == 0
    assert all(name in done.output for name in COMMANDS)
    for name in COMMANDS:
        done = CliRunner().invoke(app, [name, "--help"])
        assert done.exit_code == 0
        assert "Usage" in done.output


def test_the_commands_load_no_torch_before_they_run() -> None:
    code = "import sys, training.cli; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["collect", "nothing", "--output", "OUT/t"], "recipe: 'nothing' is none of"),
        (["collect", "RECIPE", "--output", "OUT/t", "--split", "dev"], "split: 'dev' is none of"),
        (["policy", "--recipe", "/nowhere.json"], "recipe: /nowhere.json cannot be read"),
        (["policy", "--recipe", "RECIPE", "--traces", "/nowhere"], "/nowhere: cannot be read"),
        (["policy", "--recipe", "RECIPE", "--traces", "TRACES", "--init", "/nowhere"], "policy"),
        (["policy", "--recipe", "RECIPE", "--traces", "TRACES", "--workers", "9"], "workers: 9"),
        (["baseline", "--action", "NOPE"], "action: 'NOPE' is none of SKIP, UPDATE_1"),
        (["baseline", "--action", "SKIP", "--budget", "99"], "budget: 99 lies outside"),
        (["baseline", "--action", "SKIP", "--recipe", "RECIPE", "--split", "x"], "split: 'x'"),
        (["oracle", "RECIPE", "--traces", "/nowhere"], "/nowhere: cannot be read"),
        (["oracle", "RECIPE", "--traces", "TRACES", "--split", "x"], "split: 'x' is none of"),
        (["oracle", "RECIPE", "--traces", "TRACES", "--budget", "0"], "budget: 0 lies outside"),
        (["evaluate", "RECIPE", "--output", "OUT"], "policy: none is shipped"),
        (["ablate", "RECIPE", "luck", "--traces", "TRACES", "--output", "OUT"], "name: 'luck'"),
        (["calibrate", "RECIPE", "--output", "OUT", "--stage", "x"], "stage: 'x' is none of"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    tiny_recipe_file: Path,
    tiny_traces: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    places = {"RECIPE": str(tiny_recipe_file), "TRACES": str(tiny_traces)}
    given = [places.get(each, each.replace("OUT", str(tmp_path))) for each in arguments]
    # As pyproject.toml has it, whatever is installed.
    points = [EntryPoint("train", "training.cli:app", cli.GROUP)]
    monkeypatch.setattr(cli, "entry_points", lambda *, group: points)
    monkeypatch.setattr(sys, "argv", ["ponderttt", "train", *given])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err
    assert list(tmp_path.iterdir()) == []


def run_module(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", name, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_module_run_on_its_own_refuses_in_one_line_too() -> None:
    done = run_module("training.baseline", "--action", "NOPE")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("error: action: 'NOPE' is none of SKIP, UPDATE_1, UPDATE_2, UPDATE_4\n")


def test_a_module_run_on_its_own_has_help() -> None:
    done = run_module("training.policy", "--help")
    assert done.returncode == 0
    assert "--num-iterations" in done.stdout


def test_collect_oracle_and_policy_work_one_after_the_other(
    tiny_recipe_file: Path, tmp_path: Path
) -> None:
    recipe, traces = str(tiny_recipe_file), str(tmp_path / "t.jsonl")

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    sets = ("--split", "train", "--split", "test")
    run("collect", recipe, "--output", traces, *sets, "--quiet")
    assert (tmp_path / "t.corpora.json").exists()
    shown = run("oracle", recipe, "--traces", traces, "--budget", "3")
    assert all(f"{name}#0" in shown for name in tiny.HELD_OUT)
    folder = tmp_path / "run"
    shown = run(
        "policy", "--recipe", recipe, "--traces", traces, "--output", str(folder),
        "--num-iterations", "1", "--seed", "7", "--quiet",
    )  # fmt: skip
    assert str(folder / "policy") in shown.replace("\n", "")
    told = json.loads((folder / "policy" / "policy.json").read_text())["training"]
    assert (told["seed"], told["iterations"], told["source"]) == (7, 1, "traces")
    assert told["held_out"] == list(tiny.HELD_OUT)


def test_baseline_says_what_an_action_saves(tiny_recipe_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    arguments = [
        "baseline", "--action", "UPDATE_2", "--recipe", str(tiny_recipe_file), "--budget", "2",
        "--output", str(output), "--quiet",
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    results = read_results(output)
    assert {each.repository for each in results} == set(tiny.HELD_OUT)
    changes = []
    for name in tiny.HELD_OUT:
        off, learned = (
            sum(each.nats) / sum(each.tokens)
            for method in ("off", "UPDATE_2")
            for each in results
            if (each.repository, each.method) == (name, method)
        )
        assert f"{off:.4f}" in done.output
        assert f"{learned:.4f}" in done.output
        changes.append(learned / off - 1)
    assert f"mean change {sum(changes) / 2:+.2%}" in done.output


def test_the_command_is_kept_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for argv in (["ponderttt", "train", "policy", "--seed", "1"], ["policy.py", "--seed", "1"]):
        monkeypatch.setattr(sys, "argv", argv)
        assert _arguments() == ["--seed", "1"]
