"""What a block does between its matrix products: norms, rotation, activation, residual sums.

`Stages` does it operation by operation; with kernels in C for most of them, see
`ponderttt.models.native.stages`. `CompiledStages` has `torch.compile` make one kernel of each stage
instead; products and attention stay as they are, since their kernels are the best there are. All
that serving meets is compiled at start-up, so that no request waits for a compiler.
"""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ponderttt.config import cache_dir
from ponderttt.errors import ModelError
from ponderttt.models.layers import LayerNorm, RMSNorm, activated, rotate

if TYPE_CHECKING:
    from ponderttt.models.decoder import Decoder

Norm = RMSNorm | LayerNorm

# Of the warm-up; enough that the kernel is made for several threads, which fewer rows don't mind.
_ROWS = 64

_numbers = itertools.count()


class Stages:
    """The stages, one operation after the other.

    Shape letters: N rows of a flat batch, D head_dim.

    Args:
        activation: of the MLP, as in `ModelConfig`.
    """

    def __init__(self, activation: str) -> None:
        self._activation = activation

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """The norm of [N, hidden] by itself."""
        return norm(x)

    def add_norm(self, x: Tensor, delta: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """x + delta and its norm, each [N, hidden], of two [N, hidden]."""
        x = x + delta
        return x, norm(x)

    def rotate(self, heads: Tensor, count: int, cos: Tensor, sin: Tensor) -> Tensor:
        """[N, heads, D] → its first `count` heads with rotary positions, as of `Rotary.at`."""
        return rotate(heads[:, :count], cos, sin)

    def activate(self, parts: tuple[Tensor, ...]) -> Tensor:
        """(gate, up), or (up,) where the MLP is not gated, each [N, inner] → [N, inner]."""
        return activated(parts, self._activation)


class CompiledStages(Stages):
    """The same by kernels of `torch.compile`, equal up to the order of floating-point operations.

    Used in inference mode, and where a gradient flows through two rows or more. What is neither
    (judging an update, the first stages of a write) is left to `Stages`: it takes little of the
    time, and every further kind of input takes seconds to compile.

    Args:
        decoder: whose sizes and norms the kernels are for.
    Raises:
        ModelError: they can't be compiled here; says why and what to do.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder.config.activation)
        _choose_cache()
        self._number = next(_numbers)
        self._marking = False
        self._add_norm = self._compiled(_add_norm_of(decoder.final_norm))
        self._rotate = self._compiled(_rotation())
        self._activate = self._compiled(_activation(decoder.config.activation))
        try:
            # Weights that were made in inference mode could not take part in a write.
            with torch.inference_mode(False), warnings.catch_warnings():
                # Dynamo asks every input for its gradient, leaf or not.
                warnings.filterwarnings("ignore", "The .grad attribute", UserWarning)
                warnings.filterwarnings("ignore", "Reliance on distutils", UserWarning)
                self._warm_up(decoder)
        # Whatever dynamo, inductor or the compiler raise: they have no common base.
        except Exception as error:
            raise ModelError(_refusal(decoder.device, error)) from error

    def add_norm(self, x: Tensor, delta: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """As of `Stages`."""
        # In a write's first block nothing but the delta has a gradient.
        if not (_serves(x) or (_learns(x) and delta.requires_grad)):
            return super().add_norm(x, delta, norm)
        bias = norm.bias if isinstance(norm, LayerNorm) else None
        total, normed = self._add_norm(self._flat(x), self._flat(delta), norm.weight, bias)
        return total.view(x.shape), normed.view(x.shape)

    def rotate(self, heads: Tensor, count: int, cos: Tensor, sin: Tensor) -> Tensor:
        """As of `Stages`."""
        if not (_serves(heads) or _learns(heads)):
            return super().rotate(heads, count, cos, sin)
        if len(heads) == 1:
            return self._rotate(heads[0, :count], cos[0], sin[0])[None]
        turning = self._marked(heads.contiguous()[:, :count])
        return self._rotate(turning, self._marked(cos), self._marked(sin))

    def activate(self, parts: tuple[Tensor, ...]) -> Tensor:
        """As of `Stages`."""
        if not (_serves(parts[0]) or all(_learns(part) for part in parts)):
            return super().activate(parts)
        shape = parts[0].shape
        # Halves of one matrix as they lie, or matrices of their own: no third way to compile.
        halves = not parts[0].requires_grad and all(
            part.stride() == (len(parts) * shape[1], 1) for part in parts
        )
        flat = [self._marked(p) if halves and shape[0] > 1 else self._flat(p) for p in parts]
        return self._activate(*flat).view(shape)

    def _flat(self, x: Tensor) -> Tensor:
        """[N, width] contiguous, or [width] of a single row, whose strides could be anything."""
        return x.reshape(-1) if len(x) == 1 else self._marked(x.contiguous())

    def _marked(self, x: Tensor) -> Tensor:
        """At warm-up, as one whose number of rows may be any.

        `dynamic=True` would have all widths open as well, and slower kernels of that.
        """
        if self._marking:
            torch._dynamo.mark_dynamic(x, 0)
        return x

    def _compiled(self, function: FunctionType) -> Callable[..., Any]:
        # What is known of a function, and how often it may be compiled, goes by its code and name:
        # other decoders of this process must not count.
        code = function.__code__.replace(co_name=f"{function.__name__}_{self._number}")
        own = FunctionType(
            code, function.__globals__, code.co_name, function.__defaults__, function.__closure__
        )
        return torch.compile(own, fullgraph=True)

    def _warm_up(self, decoder: Decoder) -> None:
        """Compile for one row and for any more, in inference mode; and for a write, both ways."""
        self._marking = True
        try:
            with torch.inference_mode():
                self._run_all(decoder, 1, learns=False)
                self._run_all(decoder, _ROWS, learns=False)
            with torch.enable_grad():
                found = self._run_all(decoder, _ROWS, learns=True)
                torch.stack([each.sum() for each in found]).sum().backward()
        finally:
            self._marking = False

    def _run_all(self, decoder: Decoder, rows: int, *, learns: bool) -> list[Tensor]:
        c, device, dtype = decoder.config, decoder.device, decoder.dtype

        def some(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype, requires_grad=learns)

        x, delta = some(rows, c.hidden_size), some(rows, c.hidden_size)
        found = list(self.add_norm(x, delta, decoder.final_norm))
        # As separate matrices and as halves of one; there is no difference where there is one part.
        count = 2 if c.gated_mlp else 1
        found.append(self.activate(tuple(some(rows, c.intermediate_size) for _ in range(count))))
        if not learns and rows > 1:
            self.activate(some(rows, count * c.intermediate_size).chunk(count, -1))
        if decoder.rotary is not None:
            rope = decoder.rotary.at(torch.zeros(rows, dtype=torch.int64, device=device))
            turning = c.num_heads + c.num_kv_heads
            heads = some(rows, turning + c.num_kv_heads, c.head_dim)
            found.append(self.rotate(heads, turning, *rope))
        return found


def _serves(x: Tensor) -> bool:
    return torch.is_inference_mode_enabled() and x.is_inference()


def _learns(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled() and len(x) > 1


def _add_norm_of(norm: Norm) -> Any:
    eps = norm.eps

    def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: None) -> tuple[Tensor, Tensor]:
        total = x + delta
        return total, F.rms_norm(total, weight.shape, weight, eps)

    def add_layer_norm(
        x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = x + delta
        return total, F.layer_norm(total, weight.shape, weight, bias, eps)

    return add_rms_norm if isinstance(norm, RMSNorm) else add_layer_norm


def _rotation() -> Any:
    def rotate_heads(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(heads, cos, sin)

    return rotate_heads


def _activation(kind: str) -> Any:
    def activate_parts(*parts: Tensor) -> Tensor:
        return activated(parts, kind)

    return activate_parts


def _choose_cache() -> None:
    """Keep what is compiled below our cache, and compile in this process.

    A pool of compiling processes would be started for a dozen small kernels and stay.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if sys.version_info < (3, 12):
        # Inductor imports setuptools, which would put its own distutils into the place of Python's
        # and fails where something else has imported that, or pip.
        os.environ.setdefault("SETUPTOOLS_USE_DISTUTILS", "stdlib")


def _refusal(device: torch.device, error: Exception) -> str:
    cause = next((line for line in str(error).splitlines() if line.strip()), repr(error))
    needs = (
        "a C++ compiler (g++ or another that CXX names)"
        if device.type == "cpu"
        else "Triton, and a GPU and a C compiler that it can use"
    )
    return (
        f"compile: true is not possible on {device}: {type(error).__name__}: {cause.strip()}. "
        f"It needs {needs} and a writable {os.environ['TORCHINDUCTOR_CACHE_DIR']} "
        "(TORCHINDUCTOR_CACHE_DIR); or leave out --compile"
    )
