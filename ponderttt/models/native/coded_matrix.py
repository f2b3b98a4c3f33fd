"""Matrices as codes of 4 or 8 bits that decode to the very weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ponderttt.models.native.library import library

_LANES = 16
# Bits and group size of what GGUF's formats decode to: Q4_1, Q4_K; Q5_0, Q8_0; Q6_K.
_FORMATS = ((4, 32), (8, 32), (8, 16))
# Outputs on which a format is tried before the whole matrix is.
_SAMPLE = 64


class CodedMatrix:
    """A frozen float32 matrix [out, in], kept as codes.

    A group of 16 or 32 inputs of an output has a scale (and, at 4 bits, an offset), and
    weight = scale × code + offset, equal to the float32 weight or off by the rounding of float32
    (2⁻²² of the group's largest weight). A row's product does not depend on the rows beside it.
    """

    def __init__(self, codes: Tensor, shape: tuple[int, int], bits: int, group: int) -> None:
        self.codes = codes
        self.shape, self.bits, self.group = shape, bits, group

    @classmethod
    def of(cls, weight: Tensor) -> CodedMatrix | None:
        """`weight` [out, in] as codes; None where it has none, or there are no kernels here."""
        out, width = weight.shape
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            return None
        if out % _LANES or width % 32 or not weight.is_contiguous() or library() is None:
            return None
        for bits, group in _FORMATS:
            if _encode(weight[:_SAMPLE], bits, group) is None:
                continue
            codes = _encode(weight, bits, group)
            if codes is not None:
                return cls(codes, (out, width), bits, group)
        return None

    @property
    def nbytes(self) -> int:
        """Of the codes, scales and offsets."""
        return self.codes.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias`: [N, in] → [N, out], out of `bias` [out]. Not differentiable."""
        native = library()
        assert native is not None
        out, width = self.shape
        if x.dtype != torch.float32 or x.shape[1] != width:
            raise ValueError(f"rows of {x.shape[1]} × {x.dtype}, where {width} × float32 are due")
        if x.stride(1) != 1:
            x = x.contiguous()
        found = torch.empty(x.shape[0], out, dtype=torch.float32)
        panels = torch.empty(x.shape[0], width, dtype=torch.float32)
        native.ponderttt_product(
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            self.codes.data_ptr(),
            width,
            out,
            self.group,
            self.bits,
            None if bias is None else bias.data_ptr(),
            panels.data_ptr(),
            found.data_ptr(),
            torch.get_num_threads(),
        )
        return found


def _encode(weight: Tensor, bits: int, group: int) -> Tensor | None:
    native = library()
    assert native is not None
    out, width = weight.shape
    head = _LANES * (8 if bits == 4 else 4)
    size = (head + group * _LANES * bits // 8) * (width // group) * (out // _LANES)
    codes = torch.empty(size, dtype=torch.uint8)
    fits = native.ponderttt_encode(
        weight.data_ptr(), out, width, group, bits, codes.data_ptr(), torch.get_num_threads()
    )
    return codes if fits else None
