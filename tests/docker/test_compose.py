"""The compose files: valid by the compose schema, complete, and as confined as they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import ENV_PREFIX, Settings
from tests.docker.dockerfile import ROOT, read_stages

DOCKER = ROOT / "docker"
FILES = sorted(DOCKER.glob("compose*.yaml"))
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+(\.\d+)?([.-]\w+)*|ponderttt:\w+")


def load(name: str = "compose.yaml") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text())
    return loaded


SERVICES: dict[str, dict[str, Any]] = load()["services"]


def check(path: Path) -> subprocess.CompletedProcess[str]:
    """By the schema of compose-spec, which check-jsonschema carries."""
    tool = [sys.executable, "-m", "check_jsonschema"]
    command = [*tool, "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_file_is_valid_by_the_compose_schema(path: Path) -> None:
    checked = check(path)
    assert checked.returncode == 0, checked.stdout


def test_schema_refuses_a_wrong_file(tmp_path: Path) -> None:
    wrong = {"services": {"server": {"image": "a:1", "port": ["8000"]}}}
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(wrong))
    assert check(tmp_path / "compose.yaml").returncode != 0


def test_names_that_services_use_are_declared() -> None:
    declared = load()
    for service in SERVICES.values():
        assert set(service.get("networks", ())) <= set(declared["networks"])
        assert set(service.get("secrets", ())) <= set(declared["secrets"])
        assert set(service.get("depends_on", ())) <= set(SERVICES)
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source in declared["volumes"] or (DOCKER / source).exists(), volume
    assert set(load("compose.gpu.yaml")["services"]) <= set(SERVICES)


def test_images_are_pinned_and_targets_exist() -> None:
    stages = read_stages((DOCKER / "Dockerfile").read_text())
    for services in (SERVICES, load("compose.gpu.yaml")["services"]):
        for service in services.values():
            assert PINNED.fullmatch(service["image"]), service["image"]
            if "build" in service:
                assert service["build"]["target"] in stages


def test_environment_names_settings_that_exist() -> None:
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    for services in (SERVICES, load("compose.gpu.yaml")["services"]):
        names = set(services["server"]["environment"])
        assert {name for name in names if name.startswith(ENV_PREFIX)} <= known


def test_server_listens_for_all_only_with_keys_and_is_published_on_loopback() -> None:
    server = SERVICES["server"]
    assert server["environment"]["PONDERTTT_API_KEY_FILE"] == "/run/secrets/api_keys"
    assert "api_keys" in server["secrets"]
    assert "PONDERTTT_ALLOW_UNAUTHENTICATED" not in server["environment"]
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_container_gets_longer_to_stop_than_requests_get_to_drain() -> None:
    server = SERVICES["server"]
    drain = float(server["environment"]["PONDERTTT_DRAIN_SECONDS"])
    # After it, sessions are saved for as long again or 10 s at least.
    assert float(server["stop_grace_period"].removesuffix("s")) >= 2 * max(drain, 10)


@pytest.mark.parametrize("name", SERVICES)
def test_service_has_no_rights_and_cannot_write_its_image(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert "cap_add" not in service


def test_generated_code_reaches_the_server_and_writes_results_only() -> None:
    bench = SERVICES["bench"]
    assert bench["profiles"] == ["bench"]
    assert bench["networks"] == ["bench"]
    assert load()["networks"]["bench"]["internal"] is True
    others = [name for name, each in SERVICES.items() if "bench" in each["networks"]]
    assert others == ["server", "bench"]
    assert bench["volumes"] == ["results:/results"]
    assert bench["secrets"] == ["bench_key"]
    assert "ports" not in bench
    assert bench["pids_limit"] <= 1024


def test_training_runs_only_when_asked_for() -> None:
    train = SERVICES["train"]
    assert train["profiles"] == ["train"]
    traces = next(word for word in train["command"] if word.startswith("--traces="))
    assert (ROOT / traces.partition("=")[2]).is_file()


def test_gpu_override_reserves_one() -> None:
    server = load("compose.gpu.yaml")["services"]["server"]
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert server["environment"]["PONDERTTT_DEVICE"] == "cuda"
