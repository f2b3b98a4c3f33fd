"""Training without some features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ponderttt.adaptation.features import FEATURE_GROUPS, FEATURE_NAMES
from ponderttt.adaptation.policy import load_policy
from ponderttt.engine.core import EngineCore
from ponderttt.errors import InvalidRequestError
from training.ablation import WHOLE, columns_of
from training.analysis.report import EvaluationReport
from training.cli import app


def test_a_group_is_all_its_features_and_a_feature_is_itself() -> None:
    for name, features in FEATURE_GROUPS.items():
        assert [FEATURE_NAMES[column] for column in columns_of(name)] == list(features)
    assert columns_of(FEATURE_NAMES[3]) == [3]
    with pytest.raises(InvalidRequestError, match="name: 'luck' is none of"):
        columns_of("luck")


def test_what_is_left_out_has_no_influence_and_the_rest_has(
    tiny_recipe_file: Path, tiny_traces: Path, tiny_core: EngineCore, tmp_path: Path
) -> None:
    group = "history"
    assert group in FEATURE_GROUPS
    arguments = [
        "ablate", str(tiny_recipe_file), group, FEATURE_NAMES[0], "--traces", str(tiny_traces),
        "--output", str(tmp_path), "--num-iterations", "2", "--quiet",
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    report = EvaluationReport.from_json((tmp_path / "ablation.json").read_text())
    names = {WHOLE, group, FEATURE_NAMES[0]}
    assert {each.method for each in report.results} - {"oracle"} == names
    assert {each.method for each in report.comparisons} == {WHOLE}
    torch.manual_seed(0)
    rows, others = torch.randn(64, len(FEATURE_NAMES)), torch.randn(64, len(FEATURE_NAMES))
    for name in (group, FEATURE_NAMES[0]):
        columns = columns_of(name)
        changed = rows.clone()
        changed[:, columns] = 100 * others[:, columns]
        gate = load_policy(tmp_path / name, tiny_core.model_name)
        torch.testing.assert_close(gate.logits(rows), gate.logits(changed), atol=1e-7, rtol=0)
        whole = load_policy(tmp_path / WHOLE.replace(" ", "-"), tiny_core.model_name)
        assert (whole.logits(rows) - whole.logits(changed)).abs().max() > 1e-4
