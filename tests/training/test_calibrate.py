"""The search for a gradient step."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.calibration import load_calibration
from ponderttt.adaptation.rules import UpdateRule
from ponderttt.config import CACHE_VARIABLE
from ponderttt.engine.core import EngineCore
from ponderttt.errors import InvalidRequestError
from ponderttt.fast_weights.layout import LoRAConfig
from training.bench import WORST, Bench, TrialResult
from training.calibrate import search
from training.cli import app
from training.recipe import Recipe, episodes_by_split, load_split
from training.rollouts.episodes import Episode
from training.trials import (
    Trial,
    chunk_stage,
    default_stages,
    rank_stage,
    rate_stage,
    rule_stage,
    shape_stage,
    step_stages,
)

START = Trial(LoRAConfig(rank=8, alpha=16.0), UpdateRule(learning_rate=1e-3))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured costs are kept in the cache."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))


class Judge:
    """A bench that knows what every trial comes to: its change of the loss by repository."""

    def __init__(self, verdict: Callable[[Trial], Sequence[float]]) -> None:
        self.verdict = verdict
        self.seen: list[Trial] = []

    def run(self, trial: Trial, change: str) -> TrialResult:
        self.seen.append(trial)
        by_repository = {str(index): each for index, each in enumerate(self.verdict(trial))}
        return TrialResult(trial.to_dict(), change, 1.0, 1.0, by_repository, 1.5, 1.5, 3.0, "")


def searched(
    verdict: Callable[[Trial], Sequence[float]], *stages: object, start: Trial = START
) -> Trial:
    best, results = search(Judge(verdict), start, stages)  # type: ignore[arg-type]
    assert results[0].change == "start"
    return best


def test_each_stage_goes_on_from_the_best_so_far() -> None:
    def verdict(trial: Trial) -> Sequence[float]:
        rate = trial.rule.learning_rate
        return [-0.1 + abs(rate - 4e-3) + (0.0 if trial.rule.freeze_a else 0.01)]

    stages = (rate_stage(0.5, 2.0), rate_stage(0.5, 2.0), rule_stage("a", {"freeze_a": True}))
    best = searched(verdict, *stages)
    assert best.rule.learning_rate == pytest.approx(4e-3)
    assert best.rule.freeze_a
    # A stage of which nothing helps leaves things as they are.
    assert searched(verdict, *stages, chunk_stage(128), rate_stage(8.0)) == best


def test_a_trial_that_harms_a_repository_is_never_chosen() -> None:
    def verdict(trial: Trial) -> Sequence[float]:
        # The higher the rate, the better in the mean; from 2e-3 on one repository suffers.
        rate = trial.rule.learning_rate
        return [-100 * rate, 2 * WORST if rate > 1.5e-3 else -0.001]

    best = searched(verdict, rate_stage(0.5, 2.0, 4.0), rate_stage(1.2, 3.0))
    assert best.rule.learning_rate == pytest.approx(1.2e-3)
    # Not even where the search begins with one that looks better than all others.
    unsafe = replace(START, rule=replace(START.rule, learning_rate=1e-2))
    best = searched(verdict, rate_stage(0.1, 2.0), start=unsafe)
    assert best.rule.learning_rate == pytest.approx(1e-3)
    # The limit itself is safe.
    assert searched(lambda trial: [WORST - trial.rule.learning_rate], rate_stage(2.0)) != START


def test_nothing_safe_leaves_the_start() -> None:
    assert searched(lambda trial: [-1.0, 1.0], rate_stage(0.5, 2.0)) == START


def test_stages_change_what_they_say() -> None:
    ((_, ranked),) = rank_stage(32)[1](START)
    assert (ranked.lora.rank, ranked.lora.scale) == (32, START.lora.scale)
    assert ranked.rule.learning_rate == pytest.approx(0.5e-3)
    ((said, shaped),) = shape_stage("s", {"layers": 2})[1](START)
    assert (said, shaped) == ("layers=2", replace(START, lora=replace(START.lora, layers=2)))
    ((_, cut),) = chunk_stage(128)[1](START)
    assert cut == replace(START, chunk_size=128)
    for name, around in (*default_stages(1), *default_stages(30), *step_stages()):
        assert any(trial != START for _, trial in around(START)), name


def test_trials_that_are_equal_have_the_same_key() -> None:
    listed = replace(START, lora=replace(START.lora, targets=("down_proj",)))
    assert listed.key() == replace(START, lora=replace(START.lora, targets=("down_proj",))).key()
    keys = {
        START.key(), listed.key(), replace(START, action=Action.UPDATE_2).key(),
        replace(START, chunk_size=128).key(),
    }  # fmt: skip
    assert len(keys) == 4


@pytest.fixture(scope="module")
def episodes(tiny_recipe: Recipe, tiny_core: EngineCore) -> list[Episode]:
    divided = load_split(tiny_recipe.corpora, progress=False)
    return episodes_by_split(divided, tiny_core.tokenizer, tiny_recipe.episodes)["train"][:2]


def test_a_bench_recalls_what_it_measured_of_the_same_text_and_budget(
    tiny_core: EngineCore, episodes: list[Episode], tmp_path: Path
) -> None:
    path = tmp_path / "new" / "trials.jsonl"
    trial = replace(START, chunk_size=32)
    first = Bench(tiny_core, episodes, 2.0, path).run(trial, "start")
    kept = path.read_bytes()
    assert first.measured_cost <= 2.0
    assert set(first.by_repository) == {episode.repository for episode in episodes}
    assert first.relative == pytest.approx(first.loss / first.off - 1, abs=0.02)
    path.write_bytes(kept + b'{"cut')
    bench = Bench(tiny_core, episodes, 2.0, path)
    assert bench.run(trial, "start") == first
    assert path.read_bytes() == kept
    assert Bench(tiny_core, episodes, 2.0, path).run(trial, "another word") == first
    assert path.read_bytes() == kept
    Bench(tiny_core, episodes, 1.5, path).run(trial, "start")
    Bench(tiny_core, episodes[:1], 2.0, path).run(trial, "start")
    assert len(path.read_text().splitlines()) == 3


def test_the_text_is_the_same_whatever_the_chunk_size(
    tiny_core: EngineCore, episodes: list[Episode], tmp_path: Path
) -> None:
    bench = Bench(tiny_core, episodes, 2.0, tmp_path / "trials.jsonl")
    still = replace(START, action=Action.SKIP)
    for size in (16, 32, 64):
        result = bench.run(replace(still, chunk_size=size), "size")
        assert result.loss == pytest.approx(result.off, rel=1e-5)
        assert all(abs(change) < 1e-5 for change in result.by_repository.values())
        assert result.nominal_cost == 1.0


def test_a_bench_refuses_what_it_cannot_use(
    tiny_core: EngineCore, episodes: list[Episode], tmp_path: Path
) -> None:
    path = tmp_path / "trials.jsonl"
    with pytest.raises(InvalidRequestError, match="corpora: no training repository"):
        Bench(tiny_core, [], 2.0, path)
    with pytest.raises(InvalidRequestError, match=r"budget: 0\.5 lies outside"):
        Bench(tiny_core, episodes, 0.5, path)
    path.write_text("")
    with pytest.raises(InvalidRequestError, match="output"):
        Bench(tiny_core, episodes, 2.0, path / "below")


def test_calibrate_writes_what_an_engine_can_be_started_with(
    tiny_recipe_file: Path, tmp_path: Path
) -> None:
    arguments = [
        "calibrate", str(tiny_recipe_file), "--output", str(tmp_path), "--budget", "2",
        "--repositories", "1", "--chunks", "4", "--stage", "decay", "--quiet",
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    trials = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [each["change"] for each in trials] == ["start", "decay=0.01"]
    assert all(each["trial"]["chunk_size"] == 32 for each in trials)
    found = load_calibration(tmp_path / "calibration.json")
    best = min(
        (each for each in trials if max(each["by_repository"].values()) <= WORST),
        key=lambda each: sum(each["by_repository"].values()),
        default=trials[0],
    )
    assert found.rule.decay == best["trial"]["rule"]["decay"]
    assert [each["change"] for each in found.provenance["figures"]] == ["start", "decay=0.01"]
    assert found.provenance["chunk_size"] == 32
    assert found.provenance["best"] == best["change"]
    assert found.provenance["command"].endswith("--repositories 1 --chunks 4 --stage decay")
    assert done.output.count("loss") == 2


def test_an_unknown_stage_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    arguments = ["calibrate", "smollm2-135m", "--output", str(tmp_path), "--stage", "luck"]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, InvalidRequestError)
    assert "stage: 'luck' is none of learning rate, rank, optimizer" in str(done.exception)
