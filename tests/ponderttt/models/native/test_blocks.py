"""Whole blocks in one call, against the same decoder without the kernels.

The model is random, with heads of 64 and weights that went through the `gguf` package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ponderttt.fast_weights.adapter import BatchedAdapter
from ponderttt.fast_weights.layout import AdapterLayout, LoRAConfig
from ponderttt.models.checkpoint import load_decoder
from ponderttt.models.decoder import Decoder
from ponderttt.models.native import elementwise
from tests.ponderttt import reference

MOST_ROWS = 32

SHAPE = {
    "vocab_size": 160,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 64,
}


def saved(directory: Path, kind: str) -> Path:
    torch.manual_seed(5)
    network = (
        LlamaForCausalLM(LlamaConfig(**SHAPE))
        if kind == "llama"
        else Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    )
    q4_1 = GGMLQuantizationType.Q4_1
    for name, weight in network.named_parameters():
        if name.endswith("proj.weight") or weight.ndim == 2:
            weight.data = torch.from_numpy(
                dequantize(quantize(weight.detach().numpy(), q4_1), q4_1)
            )
        else:
            weight.data.uniform_(0.5, 1.5)
    network.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def native(path: Path, kernels: object) -> Decoder:
    found = load_decoder(path)
    assert found._whole is not None
    return found


def steps(model: Decoder, rows: int, first: int, last: int, adapter: object = None) -> Tensor:
    """Hidden states of three steps after texts of different lengths, block by block of a part."""
    ids = torch.randint(160, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    lengths = [(37 * row) % 150 for row in range(rows)]
    found = []
    with torch.inference_mode():
        caches = [model.new_cache(200) for _ in lengths]
        for cache, length in zip(caches, lengths, strict=True):
            if length:
                reference.forward(model, [(cache, 0, ids[:length])])
        for step in range(3):
            at = [length + step for length in lengths]
            places = [(cache, n, 1) for cache, n in zip(caches, at, strict=True)]
            batch = model.batch(places, decodes=True)
            x = model.run(model.embed(torch.tensor([ids[n] for n in at]), batch), 0, first, batch)
            x = model.run(x, first, last, batch, adapter)  # type: ignore[arg-type]
            found.append(model.run(x, last, model.config.num_layers, batch))
    return torch.stack(found)


class Nothing:
    """An adapter that adds nothing, so that blocks are run one operation after the other."""

    def delta(self, layer: int, module: str, x: Tensor) -> Tensor | None:
        return None


@pytest.mark.parametrize("rows", [1, 2, 5, MOST_ROWS])
def test_blocks_are_those_of_a_decoder_without_kernels(
    path: Path, native: Decoder, rows: int
) -> None:
    plain = load_decoder(path, packed=False, native=False)
    exact = steps(load_decoder(path, dtype=torch.float64, packed=False), rows, 0, 3)
    found, usual = steps(native, rows, 0, 3), steps(plain, rows, 0, 3)
    error = (found - exact).abs().max()
    assert error <= 4 * (usual - exact).abs().max()


@pytest.mark.parametrize("rows", [1, 5])
def test_whole_blocks_are_the_blocks_step_by_step(native: Decoder, rows: int) -> None:
    whole = steps(native, rows, 0, 3)
    for first, last in ((0, 3), (1, 3), (2, 3)):
        parts = steps(native, rows, first, last, Nothing())
        assert torch.equal(parts, whole)


def test_a_row_does_not_depend_on_the_rows_beside_it(native: Decoder) -> None:
    together = steps(native, 7, 0, 3)
    assert torch.equal(steps(native, 4, 0, 3), together[:, :4])
    assert torch.equal(steps(native, 1, 0, 3), together[:, :1])


def test_the_rows_given_are_left_as_they_were(native: Decoder) -> None:
    with torch.inference_mode():
        batch = native.batch([(native.new_cache(3), 0, 1)], decodes=True)
        x = native.embed(torch.tensor([7]), batch)
        before = x.clone()
        assert not torch.equal(native.run(x, 0, 3, batch), before)
        assert torch.equal(x, before)


def test_weights_without_codes_are_run_one_operation_after_the_other(
    tiny_llama_dir: Path,
) -> None:
    assert load_decoder(tiny_llama_dir)._whole is None


def test_any_number_of_rows_is_decoded_alike_and_nothing_else_is(native: Decoder) -> None:
    ids = torch.full((MOST_ROWS + 9,), 5)

    def first_step(count: int) -> Tensor:
        with torch.inference_mode():
            places = [(native.new_cache(2), 0, 1) for _ in range(count)]
            batch = native.batch(places, decodes=True)
            return native.run(native.embed(ids[:count], batch), 0, 3, batch)

    assert torch.equal(first_step(MOST_ROWS + 9), first_step(1).expand(MOST_ROWS + 9, -1))
    for replay, rows in ((False, 2), (True, 1)):
        batch = native.batch([(native.new_cache(4), 0, rows)], replay=replay, decodes=True)
        assert batch.decode_kernel(3, None) is None


def test_a_text_is_read_alike_beside_others_and_alone(native: Decoder) -> None:
    ids = torch.arange(40)
    with torch.inference_mode():
        alone = native.batch([(native.new_cache(20), 0, 20)])
        both = native.batch([(native.new_cache(20), 0, 20), (native.new_cache(20), 0, 20)])
        found = native.run(native.embed(ids, both), 0, 3, both)[:20]
        wanted = native.run(native.embed(ids[:20], alone), 0, 3, alone)
    assert torch.equal(found, wanted)


def test_last_token_of_a_prompt_is_read_as_a_prompt_not_decoded(native: Decoder) -> None:
    """What is known of a prompt may leave one token to be read: alone, or beside longer pieces."""
    ids = torch.arange(21)

    def last(beside: bool, **kind: bool) -> Tensor:
        with torch.inference_mode():
            cache = native.new_cache(21)
            before = native.batch([(cache, 0, 20)])
            native.run(native.embed(ids[:20], before), 0, 3, before)
            pieces = [(cache, 20, 1)] + ([(native.new_cache(9), 0, 9)] if beside else [])
            batch = native.batch(pieces, **kind)
            rows = torch.cat((ids[20:], ids[:9])) if beside else ids[20:]
            return native.run(native.embed(rows, batch), 0, 3, batch)[:1]

    alone, beside, decoded = last(False), last(True), last(False, decodes=True)
    torch.testing.assert_close(alone, beside, rtol=0, atol=2e-6)
    assert not torch.equal(alone, decoded)


def test_gradients_are_not_lost_where_there_is_no_kernel_for_them(native: Decoder) -> None:
    batch = native.batch([(native.new_cache(2), 0, 1)], decodes=True)
    q = reference.noise(1, 3, 64).requires_grad_()
    k, v = reference.noise(1, 1, 64, seed=1), reference.noise(1, 1, 64, seed=2)
    assert batch.attend(0, q, k, v, None).requires_grad
    with torch.no_grad():
        assert not batch.attend(0, q, k, v, None).requires_grad


def replayed(model: Decoder, targets: str, rows: int) -> Tensor:
    """[P], by the fast weights of the upper two blocks: of the sum of squares at the top.

    The rows stand behind 40 that were read before.
    """
    layout = AdapterLayout(model, LoRAConfig(rank=4, layers=2, targets=targets))
    weights = (0.1 * reference.noise(layout.size, seed=2)).to(model.dtype).requires_grad_()
    adapter = BatchedAdapter(layout.views(weights[None]), [0], [rows], layout.config.scale)
    cache = model.new_cache(40)
    reference.forward(model, [(cache, 0, range(40))])
    batch = model.batch([(cache, 40, rows)], replay=True)
    x = reference.noise(rows, model.config.hidden_size, seed=4).to(model.dtype)
    x = model.run(x, layout.first_layer, layout.last_layer, batch, adapter)
    (found,) = torch.autograd.grad(model.normed(x).square().mean(), weights)
    return found


@pytest.mark.parametrize("rows", [1, 2, 50])
@pytest.mark.parametrize("targets", ["mlp", "all"])
def test_gradients_of_a_write_are_those_in_float64(
    path: Path, native: Decoder, targets: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_decoder(path, packed=False, native=False)
    exact = replayed(load_decoder(path, dtype=torch.float64, native=False), targets, rows)
    usual = replayed(plain, targets, rows)
    used = set()
    for name in ("add_rms_norm", "silu_gate"):
        kernel = getattr(elementwise, name)

        def noted(*given: Tensor, name: str = name, kernel: Any = kernel) -> Any:
            used.add(name)
            return kernel(*given)

        monkeypatch.setattr(elementwise, name, noted)
    found = replayed(native, targets, rows)
    assert exact.abs().max() > 1e-3
    assert (found - exact).abs().max() <= 4 * (usual - exact).abs().max()
    # Two rows may come from the products as columns, whose gate is left to torch.
    assert used | ({"silu_gate"} if rows == 2 else set()) == {"add_rms_norm", "silu_gate"}
