"""Adapters that are something else, do not fit, or are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from ponderttt.errors import AdapterFormatError
from ponderttt.fast_weights.layout import AdapterLayout, LoRAConfig
from ponderttt.fast_weights.peft_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    export_adapter,
    import_adapter,
)
from ponderttt.models.checkpoint import load_decoder
from tests.ponderttt import reference

PREFIX = "base_model.model.model.layers"
UP_A = f"{PREFIX}.2.mlp.up_proj.lora_A.weight"
UP_B = f"{PREFIX}.2.mlp.up_proj.lora_B.weight"


@pytest.fixture(scope="module")
def layout(tiny_llama_dir: Path) -> AdapterLayout:
    return AdapterLayout(load_decoder(tiny_llama_dir), LoRAConfig(rank=4, layers=2))


@pytest.fixture
def adapter(layout: AdapterLayout, tmp_path: Path) -> Path:
    """A good adapter, for a test to spoil."""
    export_adapter(layout, reference.random_weights(layout, 1), tmp_path, base_model="tiny")
    return tmp_path


def load(layout: AdapterLayout, directory: Path) -> Tensor:
    fresh = layout.fresh(torch.device("cpu"), torch.float32)
    kept = fresh.clone()
    try:
        return import_adapter(layout, directory, fresh)
    finally:
        assert torch.equal(fresh, kept)


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("bias", "all"),
        ("use_dora", True),
        ("use_rslora", True),
        ("rank_pattern", {"up_proj": 2}),
        ("alpha_pattern", {"up_proj": 2}),
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("layer_replication", [[0, 4], [2, 4]]),
        ("target_parameters", ["mlp.up_proj.weight"]),
        ("trainable_token_indices", [1, 2]),
        ("alora_invocation_tokens", [7]),
        ("use_qalora", True),
        ("r", 5),
        ("r", 0),
        ("r", -1),
        ("r", True),
        ("r", 4.0),
        ("r", "4"),
        ("r", None),
        ("lora_alpha", 0),
        ("lora_alpha", -8),
        ("lora_alpha", True),
        ("lora_alpha", "8"),
        ("lora_alpha", None),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", 10**400),
    ],
)
def test_config_that_is_not_plain_lora_within_limits_is_refused_by_field(
    field: str, value: object, layout: AdapterLayout, adapter: Path
) -> None:
    change_config(adapter, **{field: value})
    with pytest.raises(AdapterFormatError, match=rf"{field} = "):
        load(layout, adapter)


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_config_without_a_field_that_it_needs_is_refused(
    field: str, layout: AdapterLayout, adapter: Path
) -> None:
    config = json.loads((adapter / CONFIG_FILE).read_text())
    del config[field]
    (adapter / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(AdapterFormatError, match=rf"{field} = None"):
        load(layout, adapter)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"null", b"\xff\xfe"])
def test_config_that_cannot_be_read_is_named(
    content: bytes | None, layout: AdapterLayout, adapter: Path
) -> None:
    (adapter / CONFIG_FILE).unlink()
    if content is not None:
        (adapter / CONFIG_FILE).write_bytes(content)
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json"):
        load(layout, adapter)


def test_plain_config_of_an_older_peft_is_accepted(layout: AdapterLayout, adapter: Path) -> None:
    expected = load(layout, adapter)
    known = json.loads((adapter / CONFIG_FILE).read_text())
    old = {name: known[name] for name in ("peft_type", "r", "lora_alpha", "target_modules")}
    (adapter / CONFIG_FILE).write_text(json.dumps(old))
    assert torch.equal(load(layout, adapter), expected)


@pytest.mark.parametrize("kept", [None, 0, 5, 100, 3000, -1])
def test_weights_cut_short_or_missing_are_named(
    kept: int | None, layout: AdapterLayout, adapter: Path
) -> None:
    content = (adapter / WEIGHTS_FILE).read_bytes()
    (adapter / WEIGHTS_FILE).unlink()
    if kept is not None:
        (adapter / WEIGHTS_FILE).write_bytes(content[:kept])
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.safetensors"):
        load(layout, adapter)


def test_weights_without_any_tensor_are_refused(layout: AdapterLayout, adapter: Path) -> None:
    change_tensors(adapter, dict.clear)
    with pytest.raises(AdapterFormatError, match="no tensor"):
        load(layout, adapter)


@pytest.mark.parametrize("missing", [UP_A, UP_B])
def test_half_a_projection_is_refused(missing: str, layout: AdapterLayout, adapter: Path) -> None:
    change_tensors(adapter, lambda tensors: tensors.pop(missing))
    with pytest.raises(AdapterFormatError, match=r"2\.mlp\.up_proj.* and its B"):
        load(layout, adapter)


@pytest.mark.parametrize(
    ("name", "shape"),
    [(UP_A, (3, 64)), (UP_A, (4, 65)), (UP_A, (64, 4)), (UP_B, (128, 3)), (UP_B, (128,))],
)
def test_tensor_of_another_shape_is_named(
    name: str, shape: tuple[int, ...], layout: AdapterLayout, adapter: Path
) -> None:
    change_tensors(adapter, lambda tensors: tensors.update({name: torch.ones(shape)}))
    with pytest.raises(AdapterFormatError, match=name.replace(".", r"\.")) as caught:
        load(layout, adapter)
    assert str(shape) in str(caught.value)


def test_rank_that_the_config_does_not_say_is_refused(layout: AdapterLayout, adapter: Path) -> None:
    change_config(adapter, r=3)
    with pytest.raises(AdapterFormatError, match="has shape"):
        load(layout, adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [UP_A, UP_B])
def test_value_that_is_not_finite_is_refused(
    value: float, name: str, layout: AdapterLayout, adapter: Path
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][1, 2] = value

    change_tensors(adapter, spoil)
    with pytest.raises(AdapterFormatError, match="not finite"):
        load(layout, adapter)


def test_value_that_alpha_makes_infinite_is_refused(layout: AdapterLayout, adapter: Path) -> None:
    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors[UP_B][0, 0] = 1e38

    change_tensors(adapter, enlarge)
    change_config(adapter, lora_alpha=1e6)
    with pytest.raises(AdapterFormatError, match="not finite"):
        load(layout, adapter)


@pytest.mark.parametrize(
    "foreign",
    [
        f"{PREFIX}.1.mlp.up_proj.lora_A.weight",
        f"{PREFIX}.2.self_attn.q_proj.lora_A.weight",
        f"{PREFIX}.9.mlp.up_proj.lora_B.weight",
        f"{PREFIX}.2.mlp.up_proj.lora_magnitude_vector",
        "base_model.model.lm_head.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
    ],
)
def test_tensor_outside_the_adaptive_projections_is_named(
    foreign: str, layout: AdapterLayout, adapter: Path
) -> None:
    change_tensors(adapter, lambda tensors: tensors.update({foreign: torch.ones(4, 64)}))
    with pytest.raises(AdapterFormatError, match=foreign.replace(".", r"\.")):
        load(layout, adapter)


@pytest.mark.parametrize(
    "special", [{"use_dora": True}, {"use_rslora": True}, {"bias": "lora_only"}, {"r": 32}]
)
def test_adapter_that_peft_made_with_more_than_plain_lora_is_refused(
    special: dict[str, Any], layout: AdapterLayout, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    config = LoraConfig(
        **{"r": 4, "target_modules": ["up_proj"], "layers_to_transform": [3], **special}
    )
    with reference.hf_model(tiny_llama_dir) as model:
        reference.with_peft(model, config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFormatError, match=next(iter(special))):
        load(layout, tmp_path)


def test_adapter_of_another_family_is_refused(
    layout: AdapterLayout, tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    other = AdapterLayout(load_decoder(tiny_gpt2_dir), LoRAConfig(rank=4, layers=2))
    export_adapter(other, reference.random_weights(other, 1), tmp_path, base_model="tiny")
    with pytest.raises(AdapterFormatError, match=r"transformer\.h\.2"):
        load(layout, tmp_path)
