"""Codes found in weights that the `gguf` package decoded, and products with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from ponderttt.models.native.coded_matrix import CodedMatrix
from tests.ponderttt import reference

MOST_ROWS = 32

OUT, WIDTH = 80, 512
QUANTISED = ["Q4_0", "Q4_1", "Q5_0", "Q8_0"]
# What `gguf` only decodes: from blocks of random bits.
DECODED = ["Q4_K", "Q6_K"]


def decoded(name: str, out: int = OUT, width: int = WIDTH) -> Tensor:
    """Weights [out, width] as a file of this type gives them."""
    kind = GGMLQuantizationType[name]
    if name in QUANTISED:
        noise = reference.noise(out, width).numpy()
        return torch.from_numpy(dequantize(quantize(noise, kind), kind))
    weights, size = GGML_QUANT_SIZES[kind]
    bits = np.random.default_rng(3).integers(0, 256, (out, width // weights, size), np.uint8)
    # The half-precision scales, which random bits might make infinite: first in one, last in other.
    scales = np.random.default_rng(4).uniform(1e-4, 1e-2, (out, width // weights, 2))
    halves = scales.astype(np.float16).view(np.uint8)
    if name == "Q4_K":
        bits[..., :4] = halves
    else:
        bits[..., -2:] = halves[..., :2]
    return torch.from_numpy(dequantize(bits.reshape(out, -1), kind)).clone()


def coded(weight: Tensor) -> CodedMatrix:
    found = CodedMatrix.of(weight)
    assert found is not None
    return found


def weights_of(matrix: CodedMatrix, width: int = WIDTH) -> Tensor:
    """The weights themselves: products with the unit vectors."""
    rows = torch.eye(width).split(MOST_ROWS)
    return torch.cat([matrix(part) for part in rows]).T


@pytest.mark.parametrize("name", QUANTISED)
def test_codes_decode_to_the_same_weights_to_the_last_bit(name: str) -> None:
    weight = decoded(name)
    assert torch.equal(weights_of(coded(weight)), weight)


@pytest.mark.parametrize("name", DECODED)
def test_codes_of_nested_scales_decode_to_the_weights_but_for_rounding(name: str) -> None:
    weight = decoded(name)
    error = (weights_of(coded(weight)) - weight).abs().view(OUT, -1, 16).amax(-1)
    largest = weight.abs().view(OUT, -1, 32).amax(-1).repeat_interleave(2, dim=1)
    assert (error <= 2**-22 * largest).all()


@pytest.mark.parametrize("name", ["Q4_1", "Q5_0", "Q6_K"])
def test_codes_take_a_third_of_the_memory_at_most(name: str) -> None:
    weight = decoded(name)
    assert coded(weight).nbytes <= weight.nbytes / 3


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 15, 16, 31, 32])
@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "Q6_K"])
def test_product_is_as_exact_as_a_linear_layer(rows: int, name: str) -> None:
    weight, x = decoded(name), reference.noise(rows, WIDTH, seed=1)
    bias = reference.noise(OUT, seed=2)
    exact = x.double() @ weight.double().T + bias.double()
    usual = (torch.nn.functional.linear(x, weight, bias) - exact).abs().max()
    found = coded(weight)(x, bias)
    assert (found - exact).abs().max() <= 4 * usual


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0"])
def test_a_row_does_not_depend_on_the_rows_beside_it(name: str) -> None:
    matrix, x = coded(decoded(name)), reference.noise(MOST_ROWS, WIDTH, seed=1)
    alone = torch.cat([matrix(row[None]) for row in x])
    for rows in range(1, MOST_ROWS + 1):
        assert torch.equal(matrix(x[:rows]), alone[:rows])


def test_rows_may_be_a_view() -> None:
    matrix, wide = coded(decoded("Q4_1")), reference.noise(5, 2 * WIDTH, seed=1)
    for view in (wide[:, WIDTH:], wide.T.contiguous().T[:, :WIDTH]):
        assert torch.equal(matrix(view), matrix(view.contiguous()))


@pytest.mark.parametrize("threads", [1, 3])
def test_result_is_the_same_on_any_number_of_threads(threads: int) -> None:
    matrix, x = coded(decoded("Q4_1")), reference.noise(5, WIDTH, seed=1)
    before, wanted = torch.get_num_threads(), matrix(x)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(matrix(x), wanted)
    finally:
        torch.set_num_threads(before)


def test_constant_groups_have_codes() -> None:
    weight = decoded("Q4_1")
    weight[3, :32], weight[5, 32:64] = 0.0, -1.5
    assert torch.equal(weights_of(coded(weight)), weight)


@pytest.mark.parametrize("steps", [15, 19, 22, 127, 130, 170, 190])
def test_numbers_too_small_for_half_precision_are_met_or_refused(steps: int) -> None:
    weight = torch.zeros(16, 32)
    weight[:, :3] = torch.tensor([0.0, steps, steps // 2]) * 2.0**-24
    matrix = CodedMatrix.of(weight)
    if steps <= 127:
        assert matrix is not None
    if matrix is not None:
        assert torch.equal(weights_of(matrix, 32), weight)


def test_other_rows_are_refused() -> None:
    matrix = coded(decoded("Q4_1"))
    for x in (reference.noise(2, WIDTH).bfloat16(), reference.noise(2, WIDTH // 2)):
        with pytest.raises(ValueError, match="are due"):
            matrix(x)


def test_default_dtype_does_not_matter() -> None:
    matrix, x = coded(decoded("Q4_1")), reference.noise(3, WIDTH)
    wanted = matrix(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(matrix(x), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


def spoilt(value: float) -> Tensor:
    weight = decoded("Q4_1")
    weight[70, 300] = value
    return weight


@pytest.mark.parametrize(
    "weight",
    [
        reference.noise(OUT, WIDTH),
        decoded("Q4_1")[:72],
        decoded("Q4_1")[:, :500].contiguous(),
        decoded("Q4_1")[:, 32:64],
        decoded("Q4_1").double(),
        spoilt(float("nan")),
        spoilt(float("inf")),
        spoilt(0.123456789),
    ],
    ids=["noise", "outputs", "inputs", "view", "dtype", "nan", "inf", "odd one out"],
)
def test_what_has_no_codes_is_left_alone(weight: Tensor) -> None:
    assert CodedMatrix.of(weight) is None
