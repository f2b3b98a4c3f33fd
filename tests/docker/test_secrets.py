"""docker/secrets.sh makes keys that the server takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from server.keys import digest_of, load_keys
from tests.docker.dockerfile import ROOT

SCRIPT = ROOT / "docker" / "secrets.sh"


def run(directory: Path, command: str) -> subprocess.CompletedProcess[str]:
    (directory / "ponderttt").write_text(f"#!/bin/sh\n{command}\n")
    (directory / "ponderttt").chmod(0o755)
    variables = {"PONDERTTT": str(directory / "ponderttt"), "SECRETS": str(directory)}
    return subprocess.run(
        [SCRIPT], env={**os.environ, **variables}, capture_output=True, text=True, cwd=ROOT
    )


KEYS = f"shift; exec {sys.executable} -c 'from server.keys_cli import app; app()' \"$@\""


def test_secrets_are_what_the_server_and_prometheus_read(tmp_path: Path) -> None:
    done = run(tmp_path, KEYS)
    assert done.returncode == 0, done.stderr
    made = tmp_path / "secrets"
    assert made.stat().st_mode & 0o077 == 0
    scopes = {key.digest: (key.id, set(key.scopes)) for key in load_keys(made / "keys.toml")}
    for file, key in {
        "user.key": ("user", {"completions"}),
        "bench.key": ("bench", {"completions"}),
        "metrics.key": ("prometheus", {"metrics"}),
    }.items():
        assert scopes[digest_of((made / file).read_bytes())] == key
    assert len((made / "grafana.password").read_text()) == 48

    before = (made / "keys.toml").read_text()
    again = run(tmp_path, KEYS)
    assert again.returncode == 1
    assert "move it away" in again.stderr
    assert (made / "keys.toml").read_text() == before


def test_keys_that_cannot_be_made_leave_nothing_that_looks_whole(tmp_path: Path) -> None:
    done = run(tmp_path, "echo no such image >&2; exit 3")
    assert done.returncode == 1
    assert "no such image" in done.stderr
    assert not (tmp_path / "secrets" / "keys.toml").exists()
