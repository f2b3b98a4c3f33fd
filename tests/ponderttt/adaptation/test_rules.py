"""The update rule: its limits, and the rules that ship with the embedded models."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from ponderttt.adaptation.rules import UpdateRule, rule_for
from ponderttt.errors import InvalidRequestError
from ponderttt.models.embedded import EMBEDDED


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in ("learning_rate", "eps", "max_grad_norm", "max_norm")
            for value in (0.0, -1.0, math.nan, math.inf)
        ),
        *((name, value) for name in ("beta1", "beta2") for value in (-0.1, 1.0, 1.5, math.nan)),
        *(("loss_tolerance", value) for value in (-0.1, math.nan, math.inf)),
        *(("min_tokens", value) for value in (1, 0, -5)),
    ],
)
def test_rule_out_of_range_is_refused_by_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        UpdateRule(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize("value", ["1e-3", None, True, [1.0]])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(UpdateRule)])
def test_rule_of_another_type_is_refused_by_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="is not a") as caught:
        UpdateRule.from_dict({name: value})
    assert caught.value.param == name


def test_min_tokens_is_a_whole_number() -> None:
    with pytest.raises(InvalidRequestError, match="whole number"):
        UpdateRule.from_dict({"min_tokens": 2.5})


def test_limits_themselves_are_allowed() -> None:
    rule = UpdateRule.from_dict(
        {"beta1": 0, "beta2": 0.0, "loss_tolerance": 0, "min_tokens": 2, "learning_rate": 1}
    )
    assert (rule.beta1, rule.min_tokens, rule.learning_rate) == (0, 2, 1)


def test_unknown_key_is_refused_by_name_with_those_there_are() -> None:
    with pytest.raises(InvalidRequestError, match=r"unknown.*learning_rate") as caught:
        UpdateRule.from_dict({"learning_rate": 1e-3, "lerning_rate": 1e-3})
    assert caught.value.param == "lerning_rate"


def test_embedded_models_have_calibrated_rules_and_others_a_careful_one() -> None:
    default = UpdateRule()
    assert rule_for("somebody/else") == default
    assert rule_for("smollm2-135m").learning_rate == pytest.approx(3e-3)
    for name in EMBEDDED:
        # Three times the calibrated rate made a session worse than no adaptation at all.
        assert 0 < rule_for(name).learning_rate <= 3e-3
