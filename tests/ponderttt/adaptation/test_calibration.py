"""Calibrations: the shipped ones, their form on disk, and wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ponderttt.adaptation.calibration import Calibration, calibration_for, load_calibration
from ponderttt.adaptation.rules import UpdateRule
from ponderttt.errors import InvalidRequestError
from ponderttt.fast_weights.layout import LoRAConfig
from ponderttt.models.embedded import EMBEDDED

SHARES = st.floats(0.0, 1.0, exclude_min=True)
SCALES = st.tuples(*[st.floats(1e-3, 10.0)] * 4)


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_model_has_a_calibration_of_its_own(name: str) -> None:
    calibration = calibration_for(name)
    assert calibration.provenance["model"] == name
    assert calibration.provenance["chunk_size"] == 256
    assert calibration.rule != UpdateRule()
    # Three times as much made a session worse than no adaptation at all.
    assert 0 < calibration.rule.learning_rate <= 3e-3


@pytest.mark.parametrize(
    "name", ["somebody/else", "somebody/smollm2-135m", "../calibrations/smollm2-135m", "", ".", "*"]
)
def test_any_other_model_has_the_careful_default(name: str) -> None:
    assert calibration_for(name) == Calibration(LoRAConfig(), UpdateRule(), {})


@given(
    rank=st.integers(1, 256),
    layers=st.none() | st.integers(1, 40),
    targets=st.sampled_from(["mlp", "all", ("q_proj", "v_proj")]),
    scales=SCALES,
    optimizer=st.sampled_from(["adam", "sgd", "muon"]),
    share=SHARES,
    radius=st.none() | st.floats(1e-3, 1e3),
    freeze_a=st.booleans(),
)
def test_calibration_survives_json(
    rank: int,
    layers: int | None,
    targets: str | tuple[str, ...],
    scales: tuple[float, float, float, float],
    optimizer: Any,
    share: float,
    radius: float | None,
    freeze_a: bool,
) -> None:
    calibration = Calibration(
        LoRAConfig(rank=rank, alpha=2.5, layers=layers, targets=targets, seed=3),
        UpdateRule(
            step_scales=scales, optimizer=optimizer, token_share=share, trust_region=radius,
            freeze_a=freeze_a, decay=0.5,
        ),
        {"model": "m", "chunk_size": 128, "figures": [{"loss": 2.25, "repositories": ["a"]}]},
    )  # fmt: skip
    values = calibration.to_dict()
    read_back = json.loads(json.dumps(values))
    assert read_back == values
    assert Calibration.from_dict(read_back) == calibration


def test_parts_of_a_file_that_are_not_given_have_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"lora": {"rank": 3}, "rule": {"beta1": 0.5}, "note": "é"}', encoding="utf-8")
    assert load_calibration(path) == Calibration(
        LoRAConfig(rank=3), UpdateRule(beta1=0.5), {"note": "é"}
    )


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        *(("lora", "rank", value) for value in (0, 257, 8.0, "8", True, None, 10**400)),
        *(("lora", "alpha", value) for value in (0, -1.0, "16", None, True, [1], 10**400)),
        *(("lora", "alpha", value) for value in (float("nan"), float("inf"))),
        *(("lora", "layers", value) for value in (2.0, "2", False)),
        *(("lora", "targets", value) for value in (None, 3, [3], ["q_proj", None], {"a": 1})),
        *(("lora", "seed", value) for value in (-1, 1.5, "0", 2**63, None)),
        ("lora", "ranks", 8),
        ("rule", "learning_rate", -1.0),
        ("rule", "learning_rate", "fast"),
        ("rule", "step_scales", [1, 1]),
        ("rule", "optimiser", "adam"),
    ],
)
def test_wrong_value_is_refused_by_its_name_and_by_its_file(
    part: str, name: str, value: Any, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"lora": {}, "rule": {}}
    values[part][name] = value
    with pytest.raises(InvalidRequestError) as caught:
        Calibration.from_dict(values)
    assert caught.value.param == name
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(values))
    with pytest.raises(InvalidRequestError, match=r"wrong\.json") as caught:
        load_calibration(path)
    assert caught.value.param == "calibration"
    assert f"{name}: " in str(caught.value)


@pytest.mark.parametrize("missing", ["lora", "rule"])
@pytest.mark.parametrize("instead", [None, [], "mlp"])
def test_part_that_is_no_object_is_refused(missing: str, instead: Any) -> None:
    values: dict[str, Any] = {"lora": {}, "rule": {}, "model": "m"}
    values[missing] = instead
    with pytest.raises(InvalidRequestError, match="not an object") as caught:
        Calibration.from_dict(values)
    assert caught.value.param == missing
    del values[missing]
    with pytest.raises(InvalidRequestError, match="is not there"):
        Calibration.from_dict(values)


@pytest.mark.parametrize(
    ("content", "tells"),
    [
        (b"", "not valid JSON"),
        (b'{"lora": ', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not an object"),
        (None, "can't be read"),
    ],
)
def test_file_that_is_no_calibration_is_refused_by_name(
    content: bytes | None, tells: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidRequestError, match=tells) as caught:
        load_calibration(path)
    assert caught.value.param == "calibration"
    assert "c.json" in str(caught.value)
