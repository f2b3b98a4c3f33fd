"""Plans and the model's context."""

from __future__ import annotations

from pathlib import Path

from clients.bench.checks import unfinished
from clients.results import read_results
from tests.clients.bench.comparing import found
from tests.clients.bench.conftest import Run
from tests.clients.bench.fake_server import FakeServer, split

ONE_ARM = ["--arm", "off", "--max-tokens", "20"]


def test_unrelated_code_is_cut_to_the_context(run: Run, project: Path, tmp_path: Path) -> None:
    unrelated = tmp_path / "long.py"
    unrelated.write_text("value = other(1, 2)\n" * 150)
    server = FakeServer(context=300)
    result = run(server, str(project), *ONE_ARM, "--unrelated", str(unrelated))
    assert result.exit_code == 0, result.exception
    scored = [
        b["prompt"] for b in server.bodies("/v1/completions") if "value = other" in b["prompt"]
    ]
    assert len(scored) == 1
    assert 200 < len(split(scored[0])) <= 300
    assert unrelated.read_text().startswith(scored[0])
    _, records = read_results(tmp_path / "r.jsonl")
    assert any(record["record"] == "unrelated" for record in records)


def test_single_long_line_is_cut_within(run: Run, project: Path, tmp_path: Path) -> None:
    unrelated = tmp_path / "long.py"
    unrelated.write_text("value = [" + "1, " * 1000 + "]\n")
    server = FakeServer(context=300)
    result = run(server, str(project), *ONE_ARM, "--unrelated", str(unrelated))
    assert result.exit_code == 0, result.exception


def test_targets_are_paired_where_less_unrelated_code_was_read(
    run: Run, project: Path, tmp_path: Path
) -> None:
    unrelated = tmp_path / "long.py"
    unrelated.write_text("value = other(1, 2)\n" * 150)
    runs = {
        "short": (300, ["--unrelated", str(unrelated)]),
        "long": (600, ["--unrelated", str(unrelated)]),
        "none": (600, ["--no-loss"]),
    }
    files = [tmp_path / f"{name}.jsonl" for name in runs]
    for path, (context, options) in zip(files, runs.values(), strict=True):
        server = FakeServer(context=context)
        result = run(server, str(project), *ONE_ARM, *options, output=path.name)
        assert result.exit_code == 0, result.exception
        header, records = read_results(path)
        assert header.settings["steps"] == len(records)
        assert unfinished(header, records) is None
        assert unfinished(header, records[:-1]) == (
            f"unfinished: {len(records) - 1} of {len(records)} steps"
        )
    targets = sum(record["record"] == "target" for record in records)
    result = found(*files, out=tmp_path / "c.json")
    for name in ("long off", "none off"):
        assert result["columns"][name]["exact"]["difference"]["units"] == targets
        assert result["columns"][name]["unrelated_loss"]["difference"] is None


def test_prompt_that_does_not_fit_is_refused_before_any_work(run: Run, project: Path) -> None:
    server = FakeServer(context=90)
    result = run(server, str(project), *ONE_ARM, "--unrelated-files", "0")
    message = str(result.exception)
    assert "--left-chars" in message
    assert "the model's context of 90" in message
    assert not server.bodies("/v1/completions")


def test_whose_weights_answer_is_asked_for_and_kept(
    run: Run, project: Path, tmp_path: Path
) -> None:
    choice = {"read": "base", "session": 1.5, "base": 1.25, "error": 0.1, "tokens": 128}
    server = FakeServer(choice=choice)
    result = run(server, str(project), "--arm", "adapt", "--read", "auto")
    assert result.exit_code == 0, result.exception
    header, records = read_results(tmp_path / "r.jsonl")
    assert header.settings["read"] == "auto"
    asked = [body["ttt"] for body in server.bodies("/v1/completions")]
    assert {ttt.get("read") for ttt in asked if "session" in ttt} == {"auto"}
    assert not any("read" in ttt for ttt in asked if "session" not in ttt)
    answers = [r for r in records if r["record"] == "target" and r["arm"] != "off"]
    assert answers
    assert all((r["answered_by"], r["choice"]) == ("base", choice) for r in answers)


def test_server_without_sessions_cannot_be_told_whose_weights_answer(
    run: Run, project: Path
) -> None:
    result = run(FakeServer(has_sessions=False), str(project), "--read", "session")
    assert "--read" in str(result.exception)
    assert "no sessions" in str(result.exception)
