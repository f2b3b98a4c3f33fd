"""HumanEval against a real server with a tiny model, in the real sandbox."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from clients.bench.compare import compare
from clients.bench.functional.cli import humaneval
from clients.results import read_results
from ponderttt.errors import InvalidRequestError, PonderError
from tests.server.live import Live, live_server


@pytest.fixture(scope="module")
def live(tiny_llama_dir: Path) -> Iterator[Live]:
    """A server of the tiny Llama."""
    with live_server(tiny_llama_dir) as server:
        yield server


def run(
    live: Live, output: Path, *arguments: str, summary: Path | None = None
) -> list[dict[str, Any]]:
    """Records of a run over three problems."""
    app = typer.Typer()
    app.command()(humaneval)
    shared = [
        "--base-url", live.url, "--problems", "23,28,35", "--prompting", "base", "--quiet",
        "--max-tokens", "24", "--output", str(output),
    ]  # fmt: skip
    if "--gate" in arguments:
        shared += ["--chunk-size", "32"]
    if summary is not None:
        shared += ["--json", str(summary)]
    result = CliRunner().invoke(app, [*shared, *arguments])
    if isinstance(result.exception, PonderError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return sorted(read_results(output)[1], key=lambda record: record["task_id"])


def test_every_setting_of_learning_reaches_the_server(live: Live, tmp_path: Path) -> None:
    records = run(
        live, tmp_path / "r.jsonl", "--gate", "fixed", "--action", "UPDATE_2", "--budget", "5",
        "--adapt-on", "prompt", "--cost-model", "nominal", "--when", "inline",
    )  # fmt: skip
    for record in records:
        ttt = record["ttt"]
        assert (ttt["gate"], ttt["chunk_size"], ttt["budget"]) == ("fixed", 32, 5.0)
        assert any(chunk["action"] == "UPDATE_2" for chunk in ttt["chunks"])
        assert record["nominal"] == ttt["cost"]["nominal"] > 1.0
        # A random model writes no Python.
        assert record["passed"] is False
        assert record["result"].startswith("failed: ")


def test_problems_asked_in_copies_of_a_session_leave_it_alone(live: Live, tmp_path: Path) -> None:
    name = live.new_session()
    before = live.session(name)["digest"]
    learned = run(live, tmp_path / "a.jsonl", "--session", name, "--gate", "fixed")
    assert all(record["ttt"]["version_after"] > 0 for record in learned)
    assert live.session(name)["digest"] == before
    left = [each["id"] for each in live.http.get("/v1/sessions").json()["data"]]
    assert not [each for each in left if each.startswith("bench-fork-")]

    run(live, tmp_path / "b.jsonl", "--session", name, "--gate", "fixed", "--no-fork")
    assert live.session(name)["version"] > 0


def test_prompts_tell_whose_weights_answer_unless_the_session_is_to(
    live: Live, tmp_path: Path
) -> None:
    name = live.new_session()
    run(live, tmp_path / "teach.jsonl", "--session", name, "--gate", "fixed", "--no-fork")
    out = tmp_path / "auto.json"
    auto = run(live, tmp_path / "auto.jsonl", "--session", name, summary=out)
    off = run(live, tmp_path / "off.jsonl", "--gate", "off")
    always = run(live, tmp_path / "always.jsonl", "--session", name, "--read", "session")
    by = [record["ttt"]["choice"]["read"] for record in auto]
    assert json.loads(out.read_text())["answered_by"] == dict(Counter(by))
    for record, who, base, session in zip(auto, by, off, always, strict=True):
        assert session["ttt"]["choice"] is None
        assert record["answer"] == (base if who == "base" else session)["answer"]


def test_server_that_learns_otherwise_is_neither_gone_on_with_nor_called_the_same(
    live: Live, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    path, other = tmp_path / "r.jsonl", tmp_path / "other.jsonl"
    fixed = ("--gate", "fixed", "--action", "UPDATE_1")
    run(live, path, *fixed)
    lines = path.read_text().splitlines(keepends=True)
    assert json.loads(lines[0])["settings"]["server.rule.learning_rate"] == 0.01
    path.write_text("".join(lines[:3]))
    with live_server(
        tiny_llama_dir, learning_rate=0.5, rank=2, read="session", budget=3.0
    ) as restarted:
        with pytest.raises(InvalidRequestError) as caught:
            run(restarted, path, *fixed)
        for change in (
            "server.budget 2.0, now 3.0", "server.lora.rank 8, now 2",
            "server.read 'auto', now 'session'", "server.rule.learning_rate 0.01, now 0.5",
        ):  # fmt: skip
            assert change in str(caught.value)
        assert "--output" in str(caught.value)
        run(restarted, other, *fixed)
    assert path.read_text() == "".join(lines[:3])
    app = typer.Typer()
    app.command()(compare)
    compared = tmp_path / "compared.json"
    result = CliRunner().invoke(app, [str(path), str(other), "--json", str(compared)])
    assert result.exit_code == 0, result.output
    assert "All settings are the same" not in result.output
    assert json.loads(compared.read_text())["differing"].keys() == {
        "base_url", "settings.server.budget", "settings.server.lora.rank",
        "settings.server.read", "settings.server.rule.learning_rate",
    }  # fmt: skip
    # Wherever it is, the server as it was goes on.
    assert len(run(live, path, *fixed)) == 3


def test_how_a_session_is_read_means_nothing_without_one(live: Live) -> None:
    app = typer.Typer()
    app.command()(humaneval)
    result = CliRunner().invoke(app, ["--base-url", live.url, "--read", "session"])
    assert result.exit_code != 0
    assert "--read: 'session' is for a session" in str(result.exception)
