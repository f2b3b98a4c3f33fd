"""Which projections adapt, and where their matrices lie in the flat vector."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from ponderttt.errors import InvalidRequestError
from ponderttt.fast_weights.layout import AdapterLayout, LoRAConfig
from ponderttt.models.checkpoint import load_decoder
from ponderttt.models.decoder import Decoder
from tests.ponderttt import reference

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tiny_llama_dir: Path) -> Decoder:
    return load_decoder(tiny_llama_dir)


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2_dir: Path) -> Decoder:
    return load_decoder(tiny_gpt2_dir)


def modules(layout: AdapterLayout) -> set[str]:
    return {entry.module for entry in layout.entries}


def test_layout_by_default_is_the_mlps_of_the_top_quarter(llama: Decoder, gpt2: Decoder) -> None:
    layout = AdapterLayout(llama, LoRAConfig())
    assert {entry.layer for entry in layout.entries} == {3}
    assert modules(layout) == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert (layout.first_layer, layout.last_layer) == (3, 4)
    assert modules(AdapterLayout(gpt2, LoRAConfig())) == {"mlp.c_fc", "mlp.c_proj"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj", "down_proj"), {"self_attn.q_proj", "mlp.down_proj"}),
        ("o_proj", {"self_attn.o_proj"}),
        (
            "all",
            {
                "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
            },
        ),
    ],
)  # fmt: skip
def test_targets_name_projections(
    targets: str | tuple[str, ...], expected: set[str], llama: Decoder
) -> None:
    layout = AdapterLayout(llama, LoRAConfig(targets=targets, layers=2))
    assert modules(layout) == expected
    assert len(layout.entries) == 2 * len(expected)


def test_targets_of_gpt2_reach_both_projections_of_one_name(gpt2: Decoder) -> None:
    layout = AdapterLayout(gpt2, LoRAConfig(targets=("c_proj",)))
    assert modules(layout) == {"attn.c_proj", "mlp.c_proj"}


@pytest.mark.parametrize(
    "targets",
    [(), "", "nothing", ("q_proj", "nothing"), "gate_up_proj", "q_proj,k_proj", ("mlp", "q_proj")],
)
def test_targets_that_the_model_lacks_are_refused(
    targets: str | tuple[str, ...], llama: Decoder
) -> None:
    with pytest.raises(InvalidRequestError, match="q_proj") as caught:
        AdapterLayout(llama, LoRAConfig(targets=targets))
    assert caught.value.param == "targets"


@pytest.mark.parametrize("layers", [0, -1, 5])
def test_more_blocks_than_there_are_or_none_are_refused(layers: int, llama: Decoder) -> None:
    with pytest.raises(InvalidRequestError, match=r"\[1, 4\]") as caught:
        AdapterLayout(llama, LoRAConfig(layers=layers))
    assert caught.value.param == "adaptive_layers"


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 257}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": math.inf}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
    ],
)
def test_config_out_of_range_is_refused(values: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        LoRAConfig(**values)
    assert caught.value.param == param


def test_views_share_memory_and_cover_the_vector_once(llama: Decoder) -> None:
    layout = AdapterLayout(llama, LoRAConfig(rank=3, layers=2, targets="all"))
    flat = torch.zeros(2, layout.size)
    for entry in layout.entries:
        a, b = layout.views(flat)[entry.layer, entry.module]
        assert a.shape == (2, 3, entry.in_features)
        assert b.shape == (2, entry.out_features, 3)
        a.add_(1.0)
        b.add_(1.0)
    assert flat.eq(1.0).all()


def test_layout_has_as_many_numbers_as_peft_trains(tiny_qwen2_dir: Path) -> None:
    layout = AdapterLayout(
        load_decoder(tiny_qwen2_dir), LoRAConfig(rank=5, layers=2, targets="all")
    )
    with reference.hf_model(tiny_qwen2_dir) as model:
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=5, target_modules=names, layers_to_transform=[2, 3])
        trainable, _ = reference.with_peft(model, config).get_nb_trainable_parameters()
    assert layout.size == trainable


def test_fresh_weights_are_seeded_and_change_nothing(llama: Decoder) -> None:
    layout = AdapterLayout(llama, LoRAConfig(rank=4, targets="all"))
    fresh = layout.fresh(CPU, torch.float32)
    assert torch.equal(fresh, layout.fresh(CPU, torch.float32))
    other = AdapterLayout(llama, LoRAConfig(rank=4, targets="all", seed=1))
    assert not torch.equal(fresh, other.fresh(CPU, torch.float32))
    for a, b in layout.views(fresh[None]).values():
        assert b.eq(0).all()
        # PEFT draws A by kaiming_uniform_(a=sqrt(5)): uniform within 1 / sqrt(in).
        bound = 1 / math.sqrt(a.shape[-1])
        assert 0.9 * bound < a.abs().max() <= bound
        assert abs(float(a.std()) - bound / math.sqrt(3)) < 0.1 * bound
    ids = reference.random_ids(512, 30)
    plain = reference.our_logits(llama, ids)
    assert torch.equal(reference.our_logits(llama, ids, layout, fresh), plain)
