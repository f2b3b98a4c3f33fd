"""bench.json, the table and the plots."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ponderttt.bench.lab import Lab
from ponderttt.bench.plots import draw
from ponderttt.bench.report import markdown
from ponderttt.bench.results import FILE, Results, settings
from ponderttt.bench.runner import measure
from ponderttt.errors import InvalidRequestError, UnavailableError
from tests.ponderttt.bench.fakes import Scripted

SETTINGS = settings("tiny", 1, 2, True, 0)
SPREAD = {"median": 0.2, "low": 0.1, "high": 0.3}
CURVE: dict[str, Any] = {
    "varies": "sessions",
    "chunk_size": 32,
    "unit": "s",
    "points": [{"sessions": n, "decode": SPREAD, "write": SPREAD} for n in (1, 2)],
}


@pytest.fixture
def results(lab: Lab, tmp_path: Path) -> Results:
    row = measure(Scripted(), lab, 2, lambda line: None)
    return Results(tmp_path / "out", SETTINGS, {"scripted": row}, {"sessions": CURVE})


def test_results_come_back_as_they_were_saved(results: Results) -> None:
    results.save()
    assert Results.resume(results.directory, SETTINGS) == results
    assert [path.name for path in results.directory.iterdir()] == [FILE]


def test_resume_of_nothing_begins_anew(tmp_path: Path) -> None:
    assert Results.resume(tmp_path, SETTINGS) == Results(tmp_path, SETTINGS)


def test_resume_with_other_settings_is_refused_naming_them(results: Results) -> None:
    results.save()
    with pytest.raises(InvalidRequestError, match=r"\(threads, seed\)"):
        Results.resume(results.directory, {**SETTINGS, "threads": 2, "seed": 1})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {}}'])
def test_resume_of_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        Results.resume(tmp_path, SETTINGS)


def test_row_with_a_missing_peer_is_measured_again(results: Results) -> None:
    assert not results.is_done("scripted")
    results.rows["scripted"]["skipped"] = {}
    assert results.is_done("scripted")
    assert not results.is_done("another")


def test_save_to_where_a_file_is_refused(results: Results, tmp_path: Path) -> None:
    results.directory.write_text("in the way")
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        results.save()


def test_table_states_ratio_target_verdict_and_what_was_skipped(results: Results) -> None:
    table = markdown(results)
    assert (
        "| things | the others | 2× (2–2) | ≥ 1.5× | ≥ 2.5× | yes | 5 things/s | 2.5 things/s |"
        in table
    )
    assert "| things | somebody absent | skipped | ≥ 1.5× | – | – | 5 things/s | – |" in table
    assert "- absent: not here; run `this`\n" in table
    assert "- scripted, ours: loss 0.5" in table
    assert "--quick" in table


@pytest.mark.parametrize(
    ("met", "goal_met", "word"),
    [(True, True, "goal"), (False, False, "**no**"), (None, None, "–"), (None, True, "goal")],
)
def test_table_says_how_far_a_target_was_met(
    results: Results, met: bool | None, goal_met: bool | None, word: str
) -> None:
    results.rows["scripted"]["comparisons"][0].update(met=met, goal_met=goal_met)
    assert f"| {word} |" in markdown(results).splitlines()[4]


def test_plots_are_images(results: Results) -> None:
    results.directory.mkdir()
    paths = draw(results)
    assert [path.name for path in paths] == ["ratios.png", "scaling.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_plots_without_matplotlib_name_what_to_install(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnavailableError, match=r"ponderttt\[bench\]"):
        draw(results)
