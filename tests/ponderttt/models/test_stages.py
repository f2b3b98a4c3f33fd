"""Compiled stages against the same operations one by one, and what is said without a compiler."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ponderttt.config import CACHE_VARIABLE
from ponderttt.errors import ModelError
from ponderttt.fast_weights.adapter import BatchedAdapter
from ponderttt.fast_weights.layout import AdapterLayout, LoRAConfig
from ponderttt.models.checkpoint import load_decoder
from ponderttt.models.decoder import Decoder
from ponderttt.models.stages import CompiledStages
from tests.ponderttt import reference

COMPILER = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

# Inductor's and autograd's own, on import and first use.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache directory of ours, whatever has been compiled by this user before."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        patch.setenv(CACHE_VARIABLE, str(directory))
        # Set by the code; the patch takes it away again.
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        yield directory
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", "")


@pytest.fixture(scope="module")
def llama(tiny_llama_dir: Path, inductor_cache: Path) -> tuple[Decoder, Decoder]:
    """One uncompiled, one compiled for the one thread that these tests have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return load_decoder(tiny_llama_dir), load_decoder(tiny_llama_dir, compiled=True)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def no_compiling() -> Iterator[None]:
    """From here on an input that would have something compiled is an error."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def served(decoder: Decoder, layout: AdapterLayout | None, weights: Tensor) -> list[Tensor]:
    """Logits of a prefill of 40 tokens, and of steps of 1, 2, 3 and 17 sequences after it."""
    ids = reference.random_ids(decoder.config.vocab_size, 60)
    found = []
    for sequences in (1, 2, 3, 17):
        adapter = steps = None
        if layout is not None:
            views, scale = layout.views(weights[None]), layout.config.scale
            adapter = BatchedAdapter(views, [0], [40 * sequences], scale)
            steps = BatchedAdapter(views, [0], [sequences], scale)
        caches = [decoder.new_cache(41) for _ in range(sequences)]
        pieces = [(cache, 0, ids[n : n + 40]) for n, cache in enumerate(caches)]
        found += reference.forward(decoder, pieces, adapter)
        pieces = [(cache, 40, ids[n + 40 : n + 41]) for n, cache in enumerate(caches)]
        found += reference.forward(decoder, pieces, steps, decodes=True)
    return found


def gradient(decoder: Decoder, layout: AdapterLayout, weights: Tensor, rows: int) -> Tensor:
    """[P], of the sum of squares at the top, through the adaptive blocks."""
    weights = weights.clone().requires_grad_()
    adapter = BatchedAdapter(layout.views(weights[None]), [0], [rows], layout.config.scale)
    batch = decoder.batch([(decoder.new_cache(rows), 0, rows)], replay=True)
    x = reference.noise(rows, decoder.config.hidden_size, seed=4)
    x = decoder.run(x, layout.first_layer, layout.last_layer, batch, adapter)
    (found,) = torch.autograd.grad(decoder.normed(x).square().mean(), weights)
    return found


def layout_of(decoder: Decoder, targets: str = "all") -> tuple[AdapterLayout, Tensor]:
    layout = AdapterLayout(decoder, LoRAConfig(rank=4, layers=2, targets=targets))
    return layout, reference.noise(layout.size, seed=2) * 0.1


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=reference.SPLIT_TOLERANCE)


@needs_compiler
@pytest.mark.usefixtures("no_compiling")
@pytest.mark.parametrize("targets", [None, "mlp", "all"])
def test_serving_gives_the_same_and_compiles_nothing_more(
    llama: tuple[Decoder, Decoder], targets: str | None
) -> None:
    plain, compiled = llama
    layout, weights = layout_of(plain, targets or "all")
    used = layout if targets else None
    assert_same(served(compiled, used, weights), served(plain, used, weights))


@needs_compiler
@pytest.mark.usefixtures("no_compiling")
@pytest.mark.parametrize("rows", [1, 2, 50])
@pytest.mark.parametrize("targets", ["mlp", "all"])
def test_gradients_of_a_write_are_the_same(
    llama: tuple[Decoder, Decoder], rows: int, targets: str
) -> None:
    plain, compiled = llama
    layout, weights = layout_of(plain, targets)
    expected = gradient(plain, layout, weights, rows)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(
        gradient(compiled, layout, weights, rows), expected, rtol=1e-4, atol=1e-6
    )


@needs_compiler
@pytest.mark.usefixtures("inductor_cache")
def test_layer_norm_without_gate_or_rotation(tiny_gpt2_dir: Path) -> None:
    plain, compiled = load_decoder(tiny_gpt2_dir), load_decoder(tiny_gpt2_dir, compiled=True)
    assert compiled.compiled
    assert not plain.compiled
    layout, weights = layout_of(plain)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(served(compiled, layout, weights), served(plain, layout, weights))
        expected = gradient(plain, layout, weights, 30)
        found = gradient(compiled, layout, weights, 30)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@needs_compiler
def test_compiled_stages_do_the_work(
    llama: tuple[Decoder, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, compiled = llama
    calls = []
    stages = compiled._stages
    assert isinstance(stages, CompiledStages)
    for name in ("_add_norm", "_rotate", "_activate"):
        inner = getattr(stages, name)

        def counted(*given: Tensor, name: str = name, inner: object = inner) -> object:
            calls.append(name)
            return inner(*given)  # type: ignore[operator]

        monkeypatch.setattr(stages, name, counted)
    reference.our_logits(compiled, [3])
    layers = compiled.config.num_layers
    # All sums but the last one have a norm behind them.
    assert calls.count("_add_norm") == 2 * layers - 1
    assert calls.count("_rotate") == calls.count("_activate") == layers
    calls.clear()
    gradient(compiled, *layout_of(compiled), rows=20)
    # Two blocks; the first sum is of rows that have no gradient.
    assert [calls.count(name) for name in ("_add_norm", "_rotate", "_activate")] == [2, 2, 2]


@needs_compiler
def test_kernels_are_kept_below_our_cache(
    llama: tuple[Decoder, Decoder], inductor_cache: Path
) -> None:
    assert llama[1].compiled
    assert any((inductor_cache / "inductor").rglob("*.so"))


def test_without_a_compiler_the_model_is_refused_with_what_to_do(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config as inductor
    from torch._inductor.cpp_builder import get_cpp_compiler

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        getattr(get_cpp_compiler, "cache_clear", lambda: None)()
        with pytest.raises(ModelError, match=r"^compile: true .*C\+\+ compiler .*leave out --com"):
            load_decoder(tiny_llama_dir, compiled=True)
