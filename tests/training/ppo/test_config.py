"""Settings: what is refused, and what decays."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ponderttt.errors import InvalidRequestError
from training.ppo.config import PPOConfig


@pytest.mark.parametrize(
    "changes",
    [
        {"gamma": 1.01},
        {"gae_lambda": -0.1},
        {"clip": 0.0},
        {"entropy_coef": -1.0},
        {"value_coef": math.nan},
        {"cost_value_coef": "1"},
        {"epochs": 0},
        {"minibatch_size": 2.5},
        {"target_kl": 0.0},
        {"learning_rate": math.inf},
        {"max_grad_norm": 0.0},
        {"num_steps": 0},
        {"iterations": True},
        {"seed": -1},
        {"hidden_sizes": [8]},
        {"hidden_sizes": (0,)},
        {"hidden_sizes": (10**9,)},
    ],
)
def test_setting_out_of_range_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        PPOConfig(**changes)
    assert caught.value.param == next(iter(changes))


def test_settings_that_decay_fall_linearly_and_never_to_zero() -> None:
    config = PPOConfig(learning_rate=1.0, learning_rate_decay=True, entropy_coef=2.0, iterations=4)
    assert [config.learning_rate_at(i) for i in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.25, 0.25]
    assert {config.entropy_coef_at(i) for i in range(6)} == {2.0}
