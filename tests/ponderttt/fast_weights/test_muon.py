"""Muon over sessions and matrices at once, against torch's own on one matrix at a time."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ponderttt.fast_weights.layout import AdapterLayout, LoRAConfig
from ponderttt.fast_weights.muon import muon_rows, orthogonalise
from ponderttt.models.checkpoint import load_decoder
from tests.ponderttt import reference

ROWS = 3
RATES = torch.tensor([1e-2, 3e-2, 1e-3])


@pytest.fixture
def layout(tiny_llama_dir: Path) -> AdapterLayout:
    """Wide and high matrices, several of each shape."""
    return AdapterLayout(load_decoder(tiny_llama_dir), LoRAConfig(rank=4, layers=2, targets="all"))


def noise(layout: AdapterLayout, seed: int, rows: int = ROWS) -> Tensor:
    return reference.noise(rows, layout.size, seed=seed)


def matrices(layout: AdapterLayout, row: Tensor) -> list[Tensor]:
    return list(chain.from_iterable((a[0], b[0]) for a, b in layout.views(row[None]).values()))


def torch_muon(layout: AdapterLayout, weights: Tensor, momentum: float, turns: int) -> Tensor:
    """[N, P] after some steps of torch.optim.Muon, each row by itself."""
    rows = []
    for number, (row, rate) in enumerate(zip(weights, RATES, strict=True)):
        parameters = [torch.nn.Parameter(m.clone()) for m in matrices(layout, row)]
        optimiser = torch.optim.Muon(
            parameters, lr=float(rate), weight_decay=0.0, momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        for turn in range(turns):
            gradient = noise(layout, turn)[number]
            for parameter, matrix in zip(parameters, matrices(layout, gradient), strict=True):
                parameter.grad = matrix.clone()
            optimiser.step()
        rows.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    return torch.stack(rows)


def our_muon(layout: AdapterLayout, weights: Tensor, momentum: float, turns: int) -> Tensor:
    first = torch.zeros_like(weights)
    for turn in range(turns):
        weights, first = muon_rows(layout, weights, noise(layout, turn), first, RATES, momentum)
    return weights


@pytest.mark.parametrize("momentum", [0.0, 0.6, 0.95])
def test_muon_rows_equals_torch_muon_kept_in_float32(
    layout: AdapterLayout, momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = noise(layout, 100)
    ours = our_muon(layout, weights, momentum, 5)
    # The one place where torch's formula leaves float32.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    theirs = torch_muon(layout, weights, momentum, 5)
    assert float((theirs - weights).abs().max()) > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_muon_rows_comes_near_torch_muon_in_bfloat16(layout: AdapterLayout) -> None:
    weights = noise(layout, 100)
    ours, theirs = (f(layout, weights, 0.9, 3) for f in (our_muon, torch_muon))
    moved = (theirs - weights).norm(dim=1)
    assert ((ours - theirs).norm(dim=1) < 0.02 * moved).all()


def test_orthogonalised_matrices_have_singular_values_near_one_and_keep_their_directions() -> None:
    noise = reference.noise(5, 4, 60)
    result = orthogonalise(noise)
    u, values, vh = torch.linalg.svd(result, full_matrices=False)
    assert values.min() > 0.6
    assert values.max() < 1.3
    exact_u, _, exact_vh = torch.linalg.svd(noise, full_matrices=False)
    # With exact singular values of 1, both would be the polar factor of the noise.
    torch.testing.assert_close(u @ vh, exact_u @ exact_vh, rtol=0, atol=1e-4)


def test_orthogonalised_zeros_are_zeros() -> None:
    assert torch.equal(orthogonalise(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


def test_muon_rows_batched_equals_one_by_one(layout: AdapterLayout) -> None:
    weights, gradients, first = (noise(layout, seed) for seed in (1, 2, 3))
    together = muon_rows(layout, weights, gradients, first, RATES, 0.8)
    for row in range(ROWS):
        one = slice(row, row + 1)
        alone = muon_rows(layout, weights[one], gradients[one], first[one], RATES[one], 0.8)
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[one], theirs, rtol=0, atol=1e-7)


def test_a_row_that_is_not_finite_leaves_the_others(layout: AdapterLayout) -> None:
    weights, gradients, first = (noise(layout, seed) for seed in (1, 2, 3))
    expected, _ = muon_rows(layout, weights, gradients, first, RATES, 0.8)
    gradients[1, 7] = float("nan")
    got, _ = muon_rows(layout, weights, gradients, first, RATES, 0.8)
    assert not got[1].isfinite().all()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])


def test_step_has_the_size_of_one_of_adam(layout: AdapterLayout) -> None:
    """Root mean square of 0.2 × learning rate, in A and in B."""
    start = torch.zeros(ROWS, layout.size)
    moved, _ = muon_rows(layout, start, noise(layout, 1), start, RATES, 0.0)
    for row, rate in zip(moved, RATES, strict=True):
        for matrix in matrices(layout, row):
            share = float(matrix.square().mean().sqrt() / rate)
            assert 0.14 < share < 0.26


def test_muon_rows_leaves_its_arguments_as_they_are(layout: AdapterLayout) -> None:
    weights, gradients, first = arguments = [noise(layout, seed) for seed in range(3)]
    kept = [argument.clone() for argument in arguments]
    muon_rows(layout, weights, gradients, first, RATES, 0.9)
    assert all(torch.equal(now, before) for now, before in zip(arguments, kept, strict=True))
