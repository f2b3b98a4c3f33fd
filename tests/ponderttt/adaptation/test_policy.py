"""The trained gate: its network, its choice among what is allowed, and its files."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ponderttt.adaptation.actions import NOMINAL, Action
from ponderttt.adaptation.features import FEATURE_NAMES, FEATURE_VERSION
from ponderttt.adaptation.gates import Decision, ThresholdState
from ponderttt.adaptation.policy import (
    CONFIG_FILE,
    FORMAT_VERSION,
    WEIGHTS_FILE,
    PolicyGate,
    PolicyMetadata,
    PolicyNetwork,
    load_policy,
    save_policy,
)
from ponderttt.errors import PolicyFormatError

WIDTH = len(FEATURE_NAMES)


def make_metadata(**changes: Any) -> PolicyMetadata:
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(WIDTH, generator=generator)
    std = torch.rand(WIDTH, generator=generator) + 0.5
    values: dict[str, Any] = {
        "base_model": "tiny",
        "chunk_size": 64,
        "cost_model": "nominal",
        "budgets": (2.0, 3.0),
        "feature_mean": tuple(mean.tolist()),
        "feature_std": tuple(std.tolist()),
        "hidden_sizes": (16, 8),
        "training": {"command": "train policy", "seeds": [1, 2]},
        "evaluation": {"loss": 1.5},
    }
    return PolicyMetadata(**(values | changes))


def make_network(sizes: tuple[int, ...] = (16, 8)) -> PolicyNetwork:
    torch.manual_seed(11)
    return PolicyNetwork(sizes)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "policy"
    save_policy(directory, make_network(), make_metadata())
    return directory


def edit(directory: Path, **changes: Any) -> None:
    """Change fields of policy.json; `...` takes one out."""
    path = directory / CONFIG_FILE
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def choose(gate: PolicyGate, features: Tensor, allowed: Iterable[Action]) -> Action:
    return gate.choose(
        Decision(1.0, lambda: features, frozenset(allowed), 2.0, NOMINAL, ThresholdState(), "")
    )


# --- the network and the choice -------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(16, 8), (4,), ()])
def test_logits_of_features_equal_those_of_the_plain_torch_network(sizes: tuple[int, ...]) -> None:
    metadata, network = make_metadata(hidden_sizes=sizes), make_network(sizes)
    state = network.state_dict()
    linears = [nn.Linear(i, o) for i, o in zip((WIDTH, *sizes), (*sizes, 4), strict=True)]
    names = [*(f"trunk.{2 * at}" for at in range(len(sizes))), "actor"]
    for linear, name in zip(linears, names, strict=True):
        linear.load_state_dict({k: state[f"{name}.{k}"] for k in ("weight", "bias")})
    features = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1)) * 0.9
    mean, std = torch.tensor(metadata.feature_mean), torch.tensor(metadata.feature_std)
    x = (features - mean) / std
    assert float(x.abs().max()) < 10.0  # where the gate does not clamp yet
    with torch.no_grad():
        for linear in linears[:-1]:
            x = torch.tanh(linear(x))
        expected = linears[-1](x)
    torch.testing.assert_close(PolicyGate(network, metadata).logits(features), expected)


def test_logits_of_absurd_features_are_those_at_a_bound() -> None:
    gate = PolicyGate(make_network(), make_metadata())
    far = gate.logits(torch.full((1, WIDTH), 1e30))
    torch.testing.assert_close(far, gate.logits(torch.full((1, WIDTH), 1e6)))


def test_choice_among_all_actions_is_the_argmax() -> None:
    gate = PolicyGate(make_network(), make_metadata())
    generator = torch.Generator().manual_seed(2)
    chosen = set()
    for _ in range(200):
        features = torch.randn(WIDTH, generator=generator) * 4
        expected = Action(int(gate.logits(features[None])[0].argmax()))
        assert choose(gate, features, Action) is expected
        chosen.add(expected)
    assert len(chosen) > 1


@pytest.mark.parametrize(
    "allowed",
    [{Action.SKIP}, {Action.SKIP, Action.UPDATE_1}, {Action.SKIP, Action.UPDATE_2}, set(Action)],
)
def test_choice_within_a_budget_is_the_argmax_of_what_is_allowed(allowed: set[Action]) -> None:
    gate = PolicyGate(make_network(), make_metadata())
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        features = torch.randn(WIDTH, generator=generator) * 4
        logits = gate.logits(features[None])[0]
        masked = torch.tensor([float(logits[a]) if a in allowed else -torch.inf for a in Action])
        assert choose(gate, features, allowed) is Action(int(masked.argmax()))


# --- files ----------------------------------------------------------------------------------------


def test_policy_saved_and_loaded_is_the_same(saved: Path) -> None:
    gate = load_policy(saved, "tiny")
    assert gate.metadata == make_metadata()
    features = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(4))
    before = PolicyGate(make_network(), make_metadata()).logits(features)
    assert torch.equal(gate.logits(features), before)


def test_policy_digest_tells_what_its_choices_depend_on(saved: Path) -> None:
    gate = load_policy(saved, "tiny")
    assert re.fullmatch("[0-9a-f]{64}", gate.digest)
    assert gate.digest == PolicyGate(make_network(), make_metadata(training={})).digest
    shifted = make_metadata(feature_mean=(0.25,) * WIDTH)
    assert PolicyGate(make_network(), shifted).digest != gate.digest
    other = make_network()
    other.actor.bias.data[1] += 1e-3
    assert PolicyGate(other, make_metadata()).digest != gate.digest


def test_policy_saved_holds_nothing_but_json_and_safetensors(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {"policy.json", "policy.safetensors"}
    values = json.loads((saved / CONFIG_FILE).read_text())
    assert values["format_version"] == FORMAT_VERSION
    assert values["feature_version"] == FEATURE_VERSION
    assert set(values) == {field.name for field in dataclasses.fields(PolicyMetadata)}


def test_policy_loaded_is_frozen(saved: Path) -> None:
    gate = load_policy(saved, "tiny")
    assert not gate.logits(torch.zeros(1, WIDTH)).requires_grad


def _numbers(value: float) -> list[float]:
    return [value] * WIDTH


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format_version": 2}, "format_version is 2, this server needs 1"),
        ({"format_version": "1"}, "format_version is '1'"),
        ({"feature_version": 99}, "feature_version is 99"),
        ({"base_model": "other"}, "base_model is 'other', this server needs 'tiny'"),
        ({"base_model": ...}, "base_model"),
        ({"feature_mean": ...}, "feature_mean"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"feature_std": [0.0, *_numbers(1.0)[1:]]}, "feature_std must be above 0"),
        ({"feature_std": [-1.0, *_numbers(1.0)[1:]]}, "feature_std must be above 0"),
        ({"feature_std": [1e-60, *_numbers(1.0)[1:]]}, "feature_std must be above 0"),
        ({"feature_std": _numbers(1.0)[1:]}, f"feature_std must be {WIDTH} finite numbers"),
        ({"feature_std": [float("nan"), *_numbers(1.0)[1:]]}, "feature_std must be"),
        ({"feature_mean": [float("inf"), *_numbers(1.0)[1:]]}, "feature_mean must be"),
        ({"feature_mean": [1e300, *_numbers(1.0)[1:]]}, "feature_mean must be"),
        ({"feature_mean": ["a", *_numbers(1.0)[1:]]}, "feature_mean must be"),
        ({"feature_mean": [_numbers(1.0)]}, "feature_mean must be"),
        ({"feature_mean": 0.0}, "feature_mean must be"),
        ({"feature_mean": None}, "feature_mean must be"),
        ({"hidden_sizes": 64}, "hidden_sizes must be"),
        ({"hidden_sizes": [16, "8"]}, "hidden_sizes must be"),
        ({"hidden_sizes": [16, -8]}, "hidden_sizes must be"),
        ({"hidden_sizes": [0]}, "hidden_sizes must be"),
        ({"hidden_sizes": [10**12]}, "hidden_sizes must be"),
        ({"hidden_sizes": [16, 9]}, WEIGHTS_FILE),
        ({"hidden_sizes": [16]}, WEIGHTS_FILE),
        ({"chunk_size": "64"}, "chunk_size must be"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"cost_model": "dollars"}, "cost_model must be one of nominal, measured"),
        ({"budgets": ["two"]}, "budgets must be"),
        ({"budgets": 2.0}, "budgets must be"),
    ],
)
def test_policy_whose_description_is_wrong_is_refused_by_field(
    saved: Path, changes: dict[str, Any], says: str
) -> None:
    edit(saved, **changes)
    with pytest.raises(PolicyFormatError) as caught:
        load_policy(saved, "tiny")
    assert says in str(caught.value)


def test_policy_of_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(PolicyFormatError, match="base_model is 'tiny', this server needs 'small'"):
        load_policy(saved, "small")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"tiny"', "\xff\xfe"])
def test_policy_whose_description_is_no_object_is_refused(saved: Path, text: str) -> None:
    (saved / CONFIG_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(PolicyFormatError, match="policy\\.json"):
        load_policy(saved, "tiny")


def _poison(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors["trunk.2.weight"][1, 1] = torch.nan
    return tensors


def _without_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    del tensors["actor.bias"]
    return tensors


def _with_more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"critic.weight": torch.zeros(3)}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_poison, "trunk.2.weight has values that are not finite"),
        (_without_bias, "actor.bias"),
        (_with_more, "critic.weight"),
    ],
)
def test_policy_whose_tensors_are_wrong_is_refused_by_name(
    saved: Path, damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], says: str
) -> None:
    save_file(damage(load_file(saved / WEIGHTS_FILE)), saved / WEIGHTS_FILE)
    with pytest.raises(PolicyFormatError) as caught:
        load_policy(saved, "tiny")
    assert says in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_policy_whose_weights_are_cut_short_is_refused(saved: Path, keep: int) -> None:
    path = saved / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(PolicyFormatError, match="policy\\.safetensors"):
        load_policy(saved, "tiny")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_policy_with_a_missing_file_is_refused_by_its_name(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(PolicyFormatError) as caught:
        load_policy(saved, "tiny")
    assert name in str(caught.value)
