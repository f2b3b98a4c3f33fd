"""The update rule and its limits."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from ponderttt.adaptation.rules import UpdateRule
from ponderttt.errors import InvalidRequestError

#: Fields that are one number, and always there.
NUMBERS = [
    field.name
    for field in dataclasses.fields(UpdateRule)
    if isinstance(field.default, int | float) and not isinstance(field.default, bool)
]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in ("learning_rate", "eps", "max_grad_norm", "max_norm", "trust_region")
            for value in (0.0, -1.0, math.nan, math.inf, 10**400)
        ),
        *(
            (name, value)
            for name in ("beta1", "beta2", "decay")
            for value in (-0.1, 1.0, 1.5, math.nan, 10**400)
        ),
        *(("judge_share", value) for value in (0.0, -0.5, 1.01, math.nan)),
        *(("token_share", value) for value in (0.0, -0.5, 1.01, math.nan)),
        *(("optimizer", value) for value in ("Adam", "", None, 3)),
        *(("freeze_a", value) for value in (0, 1, "true", None)),
        *(
            ("step_scales", value)
            for value in (
                (),
                (1.0,) * 3,
                (1.0,) * 5,
                (1.0, 0.0, 1.0, 1.0),
                (1.0, 1.0, 1.0, -1.0),
                (1.0, math.nan, 1.0, 1.0),
                (1.0, 1.0, math.inf, 1.0),
                (1.0, 1.0, "1", 1.0),
                (1.0, 1.0, True, 1.0),
                "1111",
                None,
                1.0,
            )
        ),
        *(("loss_tolerance", value) for value in (-0.1, math.nan, math.inf)),
        *(("min_tokens", value) for value in (1, 0, -5)),
    ],
)
def test_rule_out_of_range_is_refused_by_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        UpdateRule(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize("value", ["1e-3", None, True, [1.0]])
@pytest.mark.parametrize("name", NUMBERS)
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


def test_trust_region_of_another_type_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="trust_region: '3' is not a number"):
        UpdateRule.from_dict({"trust_region": "3"})


def test_unknown_optimizer_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidRequestError, match="'adagrad' is not one of adam, sgd, muon"):
        UpdateRule.from_dict({"optimizer": "adagrad"})


def test_rule_survives_json() -> None:
    rule = UpdateRule(
        step_scales=(1.0, 0.5, 0.3, 0.3), optimizer="muon", decay=0.01, token_share=0.5,
        trust_region=3.0, freeze_a=True,
    )  # fmt: skip
    again = UpdateRule.from_dict(json.loads(json.dumps(dataclasses.asdict(rule))))
    assert again == rule
    assert hash(again) == hash(rule)
