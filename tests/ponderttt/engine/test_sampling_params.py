"""Every limit of SamplingParams, from both sides."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.errors import InvalidRequestError, PonderError

INFINITE = (math.nan, math.inf, -math.inf)
TWO_SIDED = {
    "temperature": (0.0, 2.0),
    "top_p": (1e-9, 1.0),
    "min_p": (0.0, 1.0),
    "n": (1, 16),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (1e-9, 10.0),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
    "max_tokens": (0, 10**9),
    "top_k": (0, 10**9),
    "seed": (-(2**63), 2**63 - 1),
}
REFUSED: list[tuple[str, Any, str, str]] = [
    # field, value, how the message names the value, how it names the limit
    ("max_tokens", -1, "-1", "0 or more"),
    ("temperature", -0.1, "-0.1", "[0, 2]"),
    ("temperature", 2.1, "2.1", "[0, 2]"),
    ("top_p", -0.1, "-0.1", "[0, 1]"),
    ("top_p", 0.0, "0", "more than 0, up to 1"),
    ("top_p", 1.01, "1.01", "[0, 1]"),
    ("max_tokens", 1.5, "1.5", "whole number"),
    ("max_tokens", True, "True", "whole number"),
    ("temperature", "1", "'1'", "not a number"),
    ("temperature", 10**400, "1000", "[0, 2]"),
    ("n", 1.0, "1.0", "whole number"),
    ("seed", 0.5, "0.5", "whole number"),
    ("stop", "ab", "'ab'", "a tuple"),
    ("top_k", -2, "-2", "-1 or more"),
    ("min_p", -0.01, "-0.01", "[0, 1]"),
    ("min_p", 1.01, "1.01", "[0, 1]"),
    ("n", 0, "0", "[1, 16]"),
    ("n", 17, "17", "[1, 16]"),
    ("presence_penalty", -2.1, "-2.1", "[-2, 2]"),
    ("presence_penalty", 2.1, "2.1", "[-2, 2]"),
    ("frequency_penalty", -2.1, "-2.1", "[-2, 2]"),
    ("frequency_penalty", 2.1, "2.1", "[-2, 2]"),
    ("repetition_penalty", -1.0, "-1.0", "[0, 10]"),
    ("repetition_penalty", 0.0, "0", "divides by zero"),
    ("repetition_penalty", 10.1, "10.1", "[0, 10]"),
    ("logprobs", -1, "-1", "[0, 20]"),
    ("logprobs", 21, "21", "[0, 20]"),
    ("prompt_logprobs", -1, "-1", "[0, 20]"),
    ("prompt_logprobs", 21, "21", "[0, 20]"),
    ("stop", ("x",) * 17, "17 strings", "16"),
    ("stop", ("ok", ""), "0 characters", "1 to 1000"),
    ("stop", ("x" * 1001,), "1001 characters", "1 to 1000"),
    ("seed", 2**63, str(2**63), "64 bits"),
    ("seed", -(2**63) - 1, str(-(2**63) - 1), "64 bits"),
]


def with_field(field: str, value: Any) -> SamplingParams:
    return SamplingParams(**{field: value})


@pytest.mark.parametrize("field", TWO_SIDED)
def test_sampling_params_at_a_limit_are_accepted(field: str) -> None:
    for value in TWO_SIDED[field]:
        assert getattr(with_field(field, value), field) == value


@pytest.mark.parametrize(("field", "value", "named", "limit"), REFUSED)
def test_sampling_params_beyond_a_limit_name_field_value_and_limit(
    field: str, value: object, named: str, limit: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        with_field(field, value)
    assert caught.value.param == field
    name, _, message = str(caught.value).partition(": ")
    assert name == field
    assert named in message
    assert limit in message


@pytest.mark.parametrize("value", INFINITE)
@pytest.mark.parametrize(
    "field",
    [
        "temperature",
        "top_p",
        "min_p",
        "n",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logprobs",
        "prompt_logprobs",
    ],
)
def test_sampling_params_not_finite_are_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidRequestError, match=str(value)) as caught:
        with_field(field, value)
    assert caught.value.param == field


@pytest.mark.parametrize("bias", [-100.5, 100.5, *INFINITE])
def test_logit_bias_out_of_range_names_the_token(bias: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"\[-100, 100\]") as caught:
        SamplingParams(logit_bias={7: 0.0, 42: bias})
    assert caught.value.param == "logit_bias.42"
    assert str(bias) in str(caught.value)


def test_logit_bias_at_its_limits_is_accepted() -> None:
    bias = {0: -100.0, 1: 100.0}
    assert SamplingParams(logit_bias=bias).logit_bias == bias


def test_stop_at_its_limits_is_accepted() -> None:
    stop = ("x" * 1000,) * 16
    assert SamplingParams(stop=stop).stop == stop


def test_sampling_params_by_default_follow_openai() -> None:
    params = SamplingParams()
    assert (params.max_tokens, params.temperature, params.top_p, params.n) == (16, 1.0, 1.0, 1)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (0, 0.0, 1.0)
    assert (params.presence_penalty, params.frequency_penalty) == (0.0, 0.0)
    assert params.seed is params.logprobs is params.prompt_logprobs is None
    assert params.stop == ()
    assert params.stop_token_ids == ()
    assert params.logit_bias == {}
    assert params.ignore_eos is False


def test_sampling_params_error_is_a_value_error_of_ours() -> None:
    with pytest.raises(ValueError, match="top_p") as caught:
        SamplingParams(top_p=2.0)
    assert isinstance(caught.value, PonderError)
