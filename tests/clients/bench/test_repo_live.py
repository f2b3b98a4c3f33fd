"""The whole repository benchmark against a real server with a tiny model."""

from __future__ import annotations

import inspect
import json
import json.decoder
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from clients.bench.functional.forgetting import humaneval_in_session
from clients.bench.repo import repo
from clients.results import read_results
from tests.server.live import Live, live_server

ARGUMENTS = [
    "--gate", "threshold", "--budget", "2", "--files", "1", "--targets", "3",
    "--context-chars", "1500", "--file-chars", "1500", "--left-chars", "250", "--max-lines", "4",
    "--max-tokens", "12", "--chunk-size", "64", "--unrelated-files", "0", "--keep-sessions",
    "--match", "both", "--quiet",
]  # fmt: skip


@pytest.fixture(scope="module")
def live(tiny_llama_dir: Path) -> Iterator[Live]:
    """A server of the tiny Llama."""
    with live_server(tiny_llama_dir) as server:
        yield server


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two modules."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "decode.py").write_text(inspect.getsource(json.decoder)[:6000].rsplit("\ndef ", 1)[0])
    (root / "wrap.py").write_text(inspect.getsource(textwrap)[:3000].rsplit("\n    def ", 1)[0])
    return root


def test_whole_benchmark_learns_scores_and_forgets(
    live: Live, project: Path, tmp_path: Path
) -> None:
    app = typer.Typer()
    app.command()(repo)
    unrelated, output, out = tmp_path / "u.py", tmp_path / "r.jsonl", tmp_path / "out.json"
    unrelated.write_text("def area(radius):\n    return 3.14159 * radius ** 2\n" * 4)
    arguments = [
        str(project), "--base-url", live.url, *ARGUMENTS, "--unrelated", str(unrelated),
        "--output", str(output), "--json", str(out),
    ]  # fmt: skip
    before = live.value("learned_tokens_total")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    header, records = read_results(output)
    lead = "threshold@2"
    followers = [f"{k}={m}({lead})" for k in ("random", "fixed") for m in ("rate", "time")]
    assert {r["arm"] for r in records} == {"off", "stuffed", lead, *followers}
    assert header.model == live.model

    targets = {(r["arm"], r["unit"]): r for r in records if r["record"] == "target"}
    assert len(targets) == 3 * 7
    for (arm, unit), record in targets.items():
        assert 0 <= record["edit_similarity"] <= 1
        assert record["loss"] > 0
        if arm == "stuffed":
            assert record["prompt_tokens"] > targets["off", unit]["prompt_tokens"]
        else:
            assert record["prompt_tokens"] == targets["off", unit]["prompt_tokens"]
        if arm == lead:
            assert record["version"] > 0
            assert record["loss"] != targets["off", unit]["loss"]
            by_base = record["answered_by"] == "base"
            answered = targets["off", unit]["loss"] if by_base else record["loss"]
            assert record["answer_loss"] == pytest.approx(answered, rel=1e-4)
            if by_base:
                assert record["completion"] == targets["off", unit]["completion"]

    # Nothing was learned but by lessons, and what they say agrees with the server.
    lessons = [r for r in records if r["record"] == "lesson"]
    learned = sum(lesson["learned_tokens"] for lesson in lessons)
    assert learned > 0
    assert live.value("learned_tokens_total") - before == learned
    # The budget holds for a session, whatever its single lessons cost.
    for arm in {lead, f"random=rate({lead})", f"fixed=rate({lead})"}:
        own = [lesson for lesson in lessons if lesson["arm"] == arm]
        spent = sum(lesson["nominal"] * lesson["chunks"] for lesson in own)
        assert spent / sum(lesson["chunks"] for lesson in own) <= 2.0 + 1e-9
    names = [line.strip() for line in result.output.splitlines() if line.startswith("  bench-")]
    assert len(names) == 5
    state = live.session(names[0])
    last = [lesson for lesson in lessons if lesson["arm"] == lead][-1]
    assert (state["version"], state["digest"]) == (last["version"], last["digest"])

    # A session that has learned nothing answers as no session does.
    fresh = live.new_session()
    body = {
        "prompt": unrelated.read_text(), "max_tokens": 0, "echo": True, "logprobs": 1,
        "ttt": {"session": fresh, "gate": "off"},
    }  # fmt: skip
    scored = live.http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    values = [value for value in scored["token_logprobs"] if value is not None]
    read = next(r for r in records if r["record"] == "unrelated" and r["arm"] == "off")
    assert read["unrelated_loss"] == pytest.approx(-sum(values) / len(values), rel=1e-4)
    summary = json.loads(out.read_text())
    assert summary["arms"][lead]["differences"]["unrelated_loss"]["estimate"] != 0


def test_humaneval_is_asked_in_the_session_and_without_one_and_only_once(
    live: Live, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tiny model's context is too short for more.
    short = partial(humaneval_in_session, max_tokens=40)
    monkeypatch.setattr("clients.bench.repo_exam.humaneval_in_session", short)
    app = typer.Typer()
    app.command()(repo)
    output, out = tmp_path / "r.jsonl", tmp_path / "out.json"
    arguments = [
        str(project), "--base-url", live.url, "--gate", "threshold", "--budget", "2", "--arm",
        "adapt", "--files", "1", "--targets", "1", "--context-chars", "1500", "--max-tokens", "12",
        "--chunk-size", "64", "--no-loss", "--quiet", "--humaneval", "2",
        "--output", str(output), "--json", str(out),
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "HumanEval in the sessions" in result.output
    exams = {
        path.stem.removeprefix("r-humaneval-"): read_results(path)
        for path in tmp_path.glob("r-humaneval-*.jsonl")
        if not path.stem.endswith("-samples")
    }
    assert set(exams) == {"off", "project-threshold@2"}
    session = exams["project-threshold@2"][0].settings["session_digest"]
    lessons = [r for r in read_results(output)[1] if r["record"] == "lesson"]
    assert session == lessons[-1]["digest"]
    assert all(len(records) == 2 for _, records in exams.values())
    # What the session says is another text than what the base model says.
    texts = [[r["completion"] for r in records] for _, records in exams.values()]
    assert texts[0] != texts[1]
    found = json.loads(out.read_text())["humaneval"]["columns"]
    assert {name: cell["passed"]["units"] for name, cell in found.items()} == {
        "r-humaneval-off": 2, "r-humaneval-project-threshold@2": 2,
    }  # fmt: skip

    generated = live.value("generation_tokens_total")
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert live.value("generation_tokens_total") == generated

    # Another lesson makes another session: its exam is taken anew, and the base model's is not.
    output.unlink()
    other = [*arguments, "--file-chars", "900"]
    assert CliRunner().invoke(app, other).exit_code == 0
    path = tmp_path / "r-humaneval-project-threshold@2.jsonl"
    assert read_results(path)[0].settings["session_digest"] not in (None, session)
    off = tmp_path / "r-humaneval-off.jsonl"
    assert read_results(off) == exams["off"]
    # Unless all is to be anew.
    assert CliRunner().invoke(app, [*other, "--fresh"]).exit_code == 0
    assert read_results(off)[0].run != exams["off"][0].run


def test_lost_session_is_taught_again_to_the_same_weights(
    live: Live, project: Path, tmp_path: Path
) -> None:
    app = typer.Typer()
    app.command()(repo)
    output = tmp_path / "r.jsonl"
    arguments = [
        str(project), "--base-url", live.url, *ARGUMENTS, "--arm", "adapt", "--seed", "1",
        "--no-loss", "--output", str(output),
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    _, records = read_results(output)
    last = [r for r in records if r["record"] == "lesson"][-1]
    (name,) = (line.strip() for line in result.output.splitlines() if "  bench-" in line)
    live.http.delete(f"/v1/sessions/{name}")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    state = live.session(name)
    assert (state["version"], state["digest"]) == (last["version"], last["digest"])
