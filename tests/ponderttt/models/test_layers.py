"""The parts of a block, against torch and transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from ponderttt.models.layers import FusedLinear, LayerNorm, Part, RMSNorm, Rotary, rotate
from ponderttt.models.product import FrozenMatrix
from tests.ponderttt import reference

PARTS = (Part("mlp.gate_proj", 8, 5), Part("mlp.up_proj", 8, 3))


class OneModule:
    """An adapter that adds a constant to one projection of one block."""

    def __init__(self, layer: int, module: str, value: float) -> None:
        self._at = (layer, module)
        self._value = value

    def delta(self, layer: int, module: str, x: Tensor) -> Tensor | None:
        return torch.full((x.shape[0], 1), self._value) if (layer, module) == self._at else None


@pytest.mark.parametrize("bias", [None, reference.noise(8, seed=3)])
def test_fused_linear_equals_separate_ones(bias: Tensor | None) -> None:
    weight, x = reference.noise(8, 8), reference.noise(4, 8, seed=1)
    gate, up = FusedLinear(PARTS, FrozenMatrix(weight), bias)(x, 0, None)
    biases = (None, None) if bias is None else bias.split([5, 3])
    torch.testing.assert_close(
        gate, torch.nn.functional.linear(x, weight[:5], biases[0]), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        up, torch.nn.functional.linear(x, weight[5:], biases[1]), rtol=0, atol=1e-6
    )


def test_adapter_changes_only_the_projection_it_names() -> None:
    linear = FusedLinear(PARTS, FrozenMatrix(reference.noise(8, 8)), reference.noise(8, seed=1))
    x = reference.noise(4, 8, seed=2)
    gate, up = linear(x, 2, None)
    changed_gate, changed_up = linear(x, 2, OneModule(2, "mlp.up_proj", 0.5))
    assert torch.equal(changed_gate, gate)
    assert torch.equal(changed_up, up + 0.5)
    assert torch.equal(linear(x, 1, OneModule(2, "mlp.up_proj", 0.5))[1], up)


def test_rms_norm_is_that_of_transformers() -> None:
    theirs = LlamaRMSNorm(16, eps=1e-3)
    theirs.weight.data.copy_(reference.noise(16))
    x = reference.noise(7, 16, seed=2) * 0.05
    ours = RMSNorm(theirs.weight.data, 1e-3)(x)
    torch.testing.assert_close(ours, theirs(x).detach(), rtol=0, atol=1e-6)


def test_layer_norm_is_that_of_torch() -> None:
    theirs = torch.nn.LayerNorm(16, eps=1e-3)
    theirs.weight.data.copy_(reference.noise(16))
    theirs.bias.data.copy_(reference.noise(16, seed=1))
    x = reference.noise(7, 16, seed=2) * 0.05
    ours = LayerNorm(theirs.weight.data, theirs.bias.data, 1e-3)(x)
    torch.testing.assert_close(ours, theirs(x).detach(), rtol=0, atol=1e-6)


def test_rotary_at_scattered_positions_is_that_of_transformers() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=4096)
    positions = torch.tensor([0, 1, 7, 4095, 3])
    q, k = reference.noise(5, 4, 16), reference.noise(5, 4, 16, seed=1)
    embedding = LlamaRotaryEmbedding(config)
    expected = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], *embedding(q, positions[None])
    )
    rotary = Rotary(embedding.inv_freq, 1.0, 4096, torch.device("cpu"), torch.float32)
    for ours, theirs in zip((q, k), expected, strict=True):
        rotated = rotate(ours, *rotary.at(positions))
        torch.testing.assert_close(rotated, theirs[0].transpose(0, 1), rtol=0, atol=1e-6)
