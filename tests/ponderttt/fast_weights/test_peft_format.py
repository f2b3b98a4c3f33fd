"""Adapters exchanged with PEFT itself, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from ponderttt.fast_weights.layout import AdapterLayout, LoRAConfig
from ponderttt.fast_weights.peft_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    export_adapter,
    import_adapter,
)
from ponderttt.models.checkpoint import load_decoder
from tests.ponderttt import reference

CPU = torch.device("cpu")
LLAMA_LIKE = ["tiny_llama_dir", "tiny_qwen2_dir", "tiny_mistral_dir"]
CASES = [
    *((family, targets) for family in reference.FAMILIES for targets in ("mlp", "all")),
    *((family, ("q_proj", "o_proj", "down_proj")) for family in LLAMA_LIKE),
    ("tiny_gpt2_dir", ("c_proj",)),
    ("tiny_gpt2_dir", ("c_attn", "c_fc")),
]
TEXT = 80


def fresh(layout: AdapterLayout) -> Tensor:
    return layout.fresh(CPU, torch.float32)


def assert_adapted(adapted: Tensor, plain: Tensor) -> None:
    """The adapter really does something."""
    assert (adapted - plain).abs().max() > 0.1


@pytest.mark.parametrize(("family", "targets"), CASES)
def test_exported_adapter_gives_our_logits_in_peft(
    family: str,
    targets: str | tuple[str, ...],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    path: Path = request.getfixturevalue(family)
    decoder = load_decoder(path)
    layout = AdapterLayout(decoder, LoRAConfig(rank=5, alpha=12.0, layers=2, targets=targets))
    weights = reference.random_weights(layout, seed=1)
    export_adapter(layout, weights, tmp_path / "adapter", base_model="tiny")
    ids = reference.code_ids(path, TEXT)
    ours = reference.our_logits(decoder, ids, layout, weights)
    assert_adapted(ours, reference.our_logits(decoder, ids))
    theirs = reference.peft_logits(path, tmp_path / "adapter", ids)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=reference.LOGITS_TOLERANCE)


def peft_adapter(path: Path, directory: Path, ids: list[int], **config: Any) -> Tensor:
    """An adapter that PEFT makes and saves, and PEFT's logits with it."""
    torch.manual_seed(5)
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config)
    with reference.hf_model(path) as model:
        wrapped = reference.with_peft(model, lora).eval()
        wrapped.save_pretrained(directory)
        return reference.hf_logits(wrapped, ids)


@pytest.mark.parametrize(
    ("family", "targets", "rank", "alpha"),
    [
        ("tiny_llama_dir", ["gate_proj", "up_proj", "down_proj"], 8, 16),
        ("tiny_llama_dir", ["q_proj", "v_proj"], 3, 7),
        ("tiny_qwen2_dir", ["k_proj", "o_proj", "up_proj"], 1, 1),
        ("tiny_mistral_dir", ["self_attn.q_proj", "mlp.down_proj"], 8, 2),
        ("tiny_gpt2_dir", ["c_attn", "c_proj", "c_fc"], 4, 16),
        ("tiny_gpt2_dir", ["mlp.c_proj"], 2, 5),
    ],
)
def test_adapter_made_by_peft_gives_its_logits_here(
    family: str,
    targets: list[str],
    rank: int,
    alpha: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    path: Path = request.getfixturevalue(family)
    ids = reference.code_ids(path, TEXT)
    theirs = peft_adapter(
        path, tmp_path, ids, r=rank, lora_alpha=alpha, target_modules=targets,
        layers_to_transform=[2, 3], fan_in_fan_out=family == "tiny_gpt2_dir",
    )  # fmt: skip
    decoder = load_decoder(path)
    layout = AdapterLayout(decoder, LoRAConfig(rank=8, alpha=16.0, layers=2, targets="all"))
    weights = import_adapter(layout, tmp_path, fresh(layout))
    ours = reference.our_logits(decoder, ids, layout, weights)
    assert_adapted(ours, reference.our_logits(decoder, ids))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=reference.LOGITS_TOLERANCE)


@pytest.mark.parametrize("family", reference.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_and_import_give_back_every_bit(
    family: str, dtype: torch.dtype, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    decoder = load_decoder(request.getfixturevalue(family))
    layout = AdapterLayout(decoder, LoRAConfig(rank=3, alpha=7.0, layers=2, targets="all"))
    weights = reference.random_weights(layout, seed=2).to(dtype)
    export_adapter(layout, weights, tmp_path, base_model="tiny")
    back = import_adapter(layout, tmp_path, fresh(layout).to(dtype))
    assert back.dtype is dtype
    assert torch.equal(back, weights)
    # Over an older export, too.
    export_adapter(layout, weights * 2, tmp_path, base_model="tiny")
    assert torch.equal(import_adapter(layout, tmp_path, fresh(layout).to(dtype)), weights * 2)


def test_exported_config_names_what_vllm_and_peft_look_for(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    layout = AdapterLayout(load_decoder(tiny_llama_dir), LoRAConfig(rank=4, alpha=6.0, layers=2))
    export_adapter(layout, fresh(layout), tmp_path, base_model="some/base")
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"]) == (4, 6.0)
    assert config["layers_to_transform"] == [2, 3]
    assert sorted(config["target_modules"]) == ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
    names = set(load_file(tmp_path / WEIGHTS_FILE))
    assert len(names) == 2 * 3 * 2
    assert "base_model.model.model.layers.3.mlp.up_proj.lora_B.weight" in names


def test_projections_that_an_adapter_leaves_out_stay_fresh(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    ids = reference.code_ids(tiny_llama_dir, TEXT)
    peft_adapter(
        tiny_llama_dir, tmp_path, ids, r=4, lora_alpha=8, target_modules=["up_proj"],
        layers_to_transform=[3],
    )  # fmt: skip
    layout = AdapterLayout(load_decoder(tiny_llama_dir), LoRAConfig(rank=4, layers=2))
    weights = import_adapter(layout, tmp_path, fresh(layout))
    ours, untouched = layout.views(weights[None]), layout.views(fresh(layout)[None])
    for at in ours:
        same = all(torch.equal(m, n) for m, n in zip(ours[at], untouched[at], strict=True))
        assert same is (at != (3, "mlp.up_proj"))


def test_ranks_that_an_adapter_lacks_can_still_learn(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """With A and B both zero there, no gradient would ever move them."""
    decoder = load_decoder(tiny_llama_dir)
    ids = reference.code_ids(tiny_llama_dir, TEXT)
    peft_adapter(
        tiny_llama_dir, tmp_path, ids, r=2, lora_alpha=4, target_modules=["down_proj"],
        layers_to_transform=[3],
    )  # fmt: skip
    layout = AdapterLayout(decoder, LoRAConfig(rank=6, layers=1))
    a, b = layout.views(import_adapter(layout, tmp_path, fresh(layout))[None])[3, "mlp.down_proj"]
    fresh_a, _ = layout.views(fresh(layout)[None])[3, "mlp.down_proj"]
    assert b[..., 2:].eq(0).all()
    assert torch.equal(a[:, 2:], fresh_a[:, 2:])
    assert a[:, 2:].abs().sum(dim=2).gt(0).all()


def test_half_precision_adapter_is_widened_before_alpha_is_folded_in(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    ids = reference.code_ids(tiny_llama_dir, TEXT)
    peft_adapter(
        tiny_llama_dir, tmp_path, ids, r=8, lora_alpha=7, target_modules=["down_proj"],
        layers_to_transform=[3],
    )  # fmt: skip
    half = {name: t.bfloat16() for name, t in load_file(tmp_path / WEIGHTS_FILE).items()}
    save_file(half, tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})
    layout = AdapterLayout(load_decoder(tiny_llama_dir), LoRAConfig(rank=8, alpha=16.0))
    weights = import_adapter(layout, tmp_path, fresh(layout))
    _, b = layout.views(weights[None])[3, "mlp.down_proj"]
    stored = half["base_model.model.model.layers.3.mlp.down_proj.lora_B.weight"]
    torch.testing.assert_close(b[0], stored.float() * (7 / 16), rtol=1e-6, atol=0)
