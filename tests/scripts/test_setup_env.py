"""What the set-up script decides, with every command that it would run recorded instead."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "setup_env.py"


class Machine:
    """Stands for the commands of a machine.

    Attributes:
        ran: every command, as one line, paths shortened.
        answer: exit code and stdout for a command that contains the key.
    """

    def __init__(self, venv: Path) -> None:
        self._venv = venv
        self.ran: list[str] = []
        self.answer: dict[str, tuple[int, str]] = {}
        self.before: Callable[[str], None] = lambda _: None

    def __call__(self, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        line = " ".join(command).replace(str(self._venv), ".venv").replace(sys.executable, "python")
        self.ran.append(line)
        self.before(line)
        for part, (code, out) in self.answer.items():
            if part in line:
                return subprocess.CompletedProcess(command, code, out, "")
        return subprocess.CompletedProcess(command, 0, "", "")

    def ran_with(self, part: str) -> list[str]:
        return [line for line in self.ran if part in line]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, at work on an empty project."""
    spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    for name, value in {
        "ROOT": tmp_path,
        "VENV": venv,
        "PYTHON": venv / "bin" / "python",
        "ORIGIN": venv / "ponderttt-origin",
        "UNFINISHED": venv / "ponderttt-unfinished",
        "CONSTRAINTS": tmp_path / "constraints.txt",
    }.items():
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, value)
    (tmp_path / "constraints.txt").write_text("torch==9.8.7\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    return module


@pytest.fixture
def machine(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A Linux machine on x86-64 without a GPU, where pip's default torch is the CPU build."""
    fake = Machine(script.VENV)
    fake.answer["--dry-run"] = (0, report("9.8.7+cpu"))
    monkeypatch.setattr(script.subprocess, "run", fake)
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    monkeypatch.setattr(script.platform, "system", lambda: "Linux")
    monkeypatch.setattr(script.platform, "machine", lambda: "x86_64")
    return fake


def report(version: str) -> str:
    """What pip says would be installed."""
    return json.dumps({"install": [{"metadata": {"version": version}}]})


def has_commands(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(script.shutil, "which", lambda name: name if name in names else None)


def test_runtime_on_an_empty_project_makes_everything_once(
    script: ModuleType, machine: Machine
) -> None:
    assert script.main(["runtime"]) == 0
    assert machine.ran_with("-m venv .venv")
    assert machine.ran[-1].endswith(f"-e {script.ROOT}")
    machine.ran.clear()
    assert script.main(["runtime"]) == 0
    assert machine.ran == []


def test_dev_after_runtime_keeps_the_environment_and_adds_the_tools(
    script: ModuleType, machine: Machine
) -> None:
    script.main(["runtime"])
    machine.ran.clear()
    machine.answer["-c import sys"] = (0, "9.8.7+cpu\n")
    assert script.main(["dev"]) == 0
    assert not machine.ran_with("-m venv")
    assert not machine.ran_with("torch==")
    assert machine.ran[-1].endswith(f"-e {script.ROOT}[dev]")


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_runtime_after_a_change_installs_again(
    name: str, script: ModuleType, machine: Machine
) -> None:
    script.main(["runtime"])
    machine.ran.clear()
    with (script.ROOT / name).open("a") as file:
        file.write("# changed\n")
    assert script.main(["runtime"]) == 0
    assert machine.ran_with(f"-e {script.ROOT}")
    assert not machine.ran_with("-m venv")


@pytest.mark.parametrize("point", ["-m venv", "--upgrade pip", "install -c", "-e "])
def test_interruption_anywhere_leads_to_a_new_environment(
    point: str, script: ModuleType, machine: Machine
) -> None:
    def interrupt(line: str) -> None:
        if point in line:
            raise KeyboardInterrupt

    machine.before = interrupt
    assert script.main(["runtime"]) == 130
    (script.VENV / "half-installed").mkdir()
    (script.VENV / "half-written").touch()
    machine.before = lambda _: None
    machine.ran.clear()
    assert script.main(["runtime"]) == 0
    assert machine.ran_with("-m venv")
    assert not (script.VENV / "half-installed").exists()
    assert not (script.VENV / "half-written").exists()
    assert not script.UNFINISHED.exists()


def test_environment_of_another_python_or_place_is_made_anew(
    script: ModuleType, machine: Machine
) -> None:
    script.main(["runtime"])
    script.ORIGIN.write_text(script.origin().replace(str(script.ROOT), "/elsewhere"))
    (script.VENV / "ponderttt-runtime.stamp").write_text("of /elsewhere")
    machine.ran.clear()
    assert script.main(["runtime"]) == 0
    assert machine.ran_with("-m venv")


def test_environment_of_somebody_else_is_left_alone(
    script: ModuleType, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    script.VENV.mkdir()
    (script.VENV / "pyvenv.cfg").touch()
    assert script.main(["runtime"]) == 1
    assert "not made by this script" in capsys.readouterr().err
    assert (script.VENV / "pyvenv.cfg").exists()
    assert machine.ran == []


def test_failed_pip_is_told_and_leaves_no_stamp(
    script: ModuleType, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.answer["-e "] = (1, "")
    assert script.main(["runtime"]) == 1
    assert "run the same command again" in capsys.readouterr().err
    assert not (script.VENV / "ponderttt-runtime.stamp").exists()


def test_torch_with_a_gpu_is_pips_default(
    script: ModuleType, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_commands(script, monkeypatch, "nvidia-smi")
    machine.answer["nvidia-smi -L"] = (0, "GPU 0: NVIDIA L4\n")
    script.install_torch("torch==9.8.7")
    assert not machine.ran_with("--dry-run")
    assert machine.ran[-1].endswith("torch==9.8.7")
    assert "-m pip" in machine.ran[-1]


def test_torch_with_a_driver_but_no_gpu_is_the_cpu_build(
    script: ModuleType, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_commands(script, monkeypatch, "nvidia-smi")
    machine.answer["nvidia-smi -L"] = (9, "")
    script.install_torch("torch==9.8.7")
    assert machine.ran_with("--dry-run")


def test_torch_with_a_cpu_build_on_offer_takes_it_from_pip(
    script: ModuleType, machine: Machine
) -> None:
    script.install_torch("torch==9.8.7")
    assert not machine.ran_with("uv")
    assert "-m pip" in machine.ran[-1]


def test_torch_on_another_platform_is_pips_default(
    script: ModuleType, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.platform, "machine", lambda: "aarch64")
    machine.answer["--dry-run"] = (0, report("9.8.7"))
    script.install_torch("torch==9.8.7")
    assert not machine.ran_with("uv")


def test_torch_with_only_a_gpu_build_on_offer_asks_uv_for_the_cpu_build(
    script: ModuleType, machine: Machine
) -> None:
    machine.answer["--dry-run"] = (0, report("9.8.7"))
    script.install_torch("torch==9.8.7")
    assert machine.ran[-2].endswith("-m pip --disable-pip-version-check install uv")
    assert "-m uv pip install" in machine.ran[-1]
    assert "--torch-backend=cpu" in machine.ran[-1]


def test_torch_without_any_cpu_build_warns_of_the_size_and_goes_on(
    script: ModuleType, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.answer["--dry-run"] = (0, report("9.8.7"))
    machine.answer["-m uv"] = (2, "")
    script.install_torch("torch==9.8.7")
    assert "several GB" in capsys.readouterr().err
    assert "-m pip" in machine.ran[-1]


def test_venv_package_missing_as_root_is_installed(
    script: ModuleType, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_commands(script, monkeypatch, "apt-get")
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(script.os, "geteuid", lambda: 0)
    assert script.main(["runtime"]) == 0
    package = f"python3.{sys.version_info[1]}-venv"
    assert machine.ran[0] == "apt-get update -q"
    assert machine.ran[1].startswith("apt-get install")
    assert machine.ran[1].endswith(package)


@pytest.mark.parametrize("allowed", [True, False])
def test_venv_package_missing_as_a_user_needs_sudo_without_password(
    allowed: bool,
    script: ModuleType,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    has_commands(script, monkeypatch, "apt-get", "sudo")
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(script.os, "geteuid", lambda: 1000)
    machine.answer["sudo -n true"] = (0 if allowed else 1, "")
    assert script.main(["runtime"]) == (0 if allowed else 1)
    assert bool(machine.ran_with("sudo -n apt-get install")) == allowed
    assert ("sudo apt-get install python3." in capsys.readouterr().err) != allowed


def test_python_that_is_too_old_is_refused_with_the_way_out(script: ModuleType) -> None:
    script.require_python((3, 11), "/usr/bin/python3")
    with pytest.raises(script.SetupError, match=r"3\.11 or newer.*is 3\.9.*make PYTHON="):
        script.require_python((3, 9), "/usr/bin/python3")


def test_profile_that_does_not_exist_shows_the_usage(
    script: ModuleType, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["everything"]) == 2
    assert "setup_env.py runtime" in capsys.readouterr().err
    assert machine.ran == []


def test_constraints_of_the_project_pin_exact_versions() -> None:
    lines = (SCRIPT.parents[1] / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert any(line.startswith("torch==") for line in pins)
    assert all(line.count("==") == 1 and "+" not in line for line in pins)
    assert not {line.partition("==")[0] for line in pins} & {"ponderttt", "pip", "setuptools", "uv"}


@pytest.mark.parametrize(("chosen", "tries_cpu"), [("cuda", False), ("cpu", True)])
def test_torch_that_the_environment_chooses_is_installed_whatever_the_machine(
    chosen: str,
    tries_cpu: bool,
    script: ModuleType,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PONDERTTT_TORCH", chosen)
    if chosen == "cpu":
        has_commands(script, monkeypatch, "nvidia-smi")
        machine.answer["nvidia-smi -L"] = (0, "GPU 0: NVIDIA L4\n")
    script.install_torch("torch==9.8.7")
    assert bool(machine.ran_with("--dry-run")) is tries_cpu
    assert machine.ran[-1].endswith("torch==9.8.7")


def test_torch_for_something_else_is_refused(
    script: ModuleType,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PONDERTTT_TORCH", "tpu")
    assert script.main(["runtime"]) == 1
    assert "PONDERTTT_TORCH is 'tpu'; set it to cpu or cuda" in capsys.readouterr().err
