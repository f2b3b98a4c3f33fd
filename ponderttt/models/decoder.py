"""A decoder-only transformer whose blocks can be run in part.

Serving runs all blocks; a write replays only the top ones from the hidden states at the trunk's
top. So the decoder exposes its stages: `embed`, `run` (any range of blocks), `normed`, `logits`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ponderttt.models.attention import FlatBatch
from ponderttt.models.config import ModelConfig
from ponderttt.models.kv_cache import KVCache
from ponderttt.models.layers import (
    Adapter,
    FusedLinear,
    Part,
    Rotary,
)
from ponderttt.models.native.blocks import NativeBlocks
from ponderttt.models.native.library import identity
from ponderttt.models.native.stages import NativeStages
from ponderttt.models.product import FrozenMatrix
from ponderttt.models.stages import CompiledStages, Norm, Stages


@dataclass(frozen=True, slots=True)
class Block:
    """The weights of one transformer block; `up` is gate and up in a gated MLP."""

    attention_norm: Norm
    qkv: FusedLinear
    output: FusedLinear
    mlp_norm: Norm
    up: FusedLinear
    down: FusedLinear

    def linears(self) -> tuple[FusedLinear, ...]:
        """All linear layers, in the order in which they run."""
        return (self.qkv, self.output, self.up, self.down)


class Decoder:
    """A frozen decoder (Llama, Qwen2, Mistral or GPT-2), run stage by stage.

    Shape letters: N rows of a flat batch, V vocabulary.

    Args:
        config: the shape.
        embedding: [V, hidden].
        position_embedding: [positions, hidden] where positions are learned, else None.
        blocks: one per layer.
        final_norm: after the last block.
        head: [V, hidden], the output matrix; its weight may be the embedding itself.
        native: use kernels in C, where there are some for these shapes.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        position_embedding: Tensor | None,
        blocks: tuple[Block, ...],
        final_norm: Norm,
        head: FrozenMatrix,
        *,
        native: bool = False,
    ) -> None:
        self.config = config
        self.embedding = embedding
        self.position_embedding = position_embedding
        self.blocks = blocks
        self.final_norm = final_norm
        self.head = head
        self._native = native
        self._stages = (NativeStages if native else Stages)(config.activation)
        self._whole = NativeBlocks.of(config, blocks) if native else None
        self.rotary = (
            Rotary(
                config.inv_freq, config.rope_scale, config.max_positions, self.device, self.dtype
            )
            if config.inv_freq is not None
            else None
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and keys and values."""
        return self.embedding.dtype

    @property
    def kernels(self) -> str | None:
        """Which kernels in C are in use between the products, by their sources; None: none.

        None also after `compile`, which puts its own in their place; products and attention of a
        decode step have theirs in C even then.
        """
        fits = self.device.type == "cpu" and self.dtype == torch.float32
        return identity() if fits and isinstance(self._stages, NativeStages) else None

    @property
    def compiled(self) -> bool:
        """Whether `compile` was called."""
        return isinstance(self._stages, CompiledStages)

    def compile(self) -> None:
        """From now on have kernels of `torch.compile` between the matrix products.

        Takes seconds, more of them at first; the kernels are kept in the cache directory. They are
        for the present number of threads: after a change they are compiled again when needed.

        Raises:
            ModelError: they can't be compiled here; says why and what to do.
        """
        self._stages = CompiledStages(self)
        self._whole = None

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for one sequence of at most `capacity` positions."""
        c = self.config
        return KVCache(c.num_layers, c.num_kv_heads, c.head_dim, capacity, self.device, self.dtype)

    def batch(
        self,
        segments: list[tuple[KVCache, int, int]],
        *,
        replay: bool = False,
        decodes: bool = False,
    ) -> FlatBatch:
        """A flat batch of (cache, first position, rows) on this model's device.

        `replay` and `decodes` as of `FlatBatch`.
        """
        from ponderttt.models.attention import Segment

        return FlatBatch(
            [Segment(*segment) for segment in segments],
            self.device,
            self.dtype,
            replay=replay,
            native=self._native,
            decodes=decodes,
        )

    def module_parts(self, layer: int) -> tuple[Part, ...]:
        """Every linear projection of a block, by its name in the checkpoint."""
        return tuple(part for linear in self.blocks[layer].linears() for part in linear.parts)

    def embed(self, token_ids: Tensor, batch: FlatBatch) -> Tensor:
        """[N] int64 → [N, hidden]."""
        x = self.embedding[token_ids]
        if self.position_embedding is not None:
            x = x + self.position_embedding[batch.positions]
        return x

    def run(
        self, x: Tensor, first: int, last: int, batch: FlatBatch, adapter: Adapter | None = None
    ) -> Tensor:
        """Blocks first … last-1 over [N, hidden]; the result has the same shape.

        Keys and values of the rows are stored in the segments' caches unless the batch replays.
        """
        if first >= last:
            return x
        rope = self.rotary.at(batch.positions) if self.rotary is not None else None
        # What decodes reads the matrices' codes, whatever else is in the step, and nothing else
        # does: so a sequence is the same to the bit beside others or alone.
        decodes = self._native and batch.decodes
        if decodes and adapter is None and rope is not None and self._whole is not None:
            c = self.config
            kernel = batch.decode_kernel(c.num_heads, c.sliding_windows[0])
            if kernel is not None and self._whole.takes(x):
                return self._whole(x, first, last, kernel, rope)
        stages = self._stages
        normed = stages.norm(x, self.blocks[first].attention_norm)
        for layer in range(first, last - 1):
            x, delta = self._block(x, normed, layer, batch, adapter, rope)
            # Each sum goes with the norm of the block after it.
            x, normed = stages.add_norm(x, delta, self.blocks[layer + 1].attention_norm)
        x, delta = self._block(x, normed, last - 1, batch, adapter, rope)
        return x + delta

    def _block(
        self,
        x: Tensor,
        normed: Tensor,
        layer: int,
        batch: FlatBatch,
        adapter: Adapter | None,
        rope: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """[N, hidden] before the MLP, and what it adds; `normed` is the attention's input."""
        block, c = self.blocks[layer], self.config
        coded = self._native and batch.decodes
        q, k, v = self.project_qkv(normed, layer, adapter, rope, decodes=coded)
        attended = batch.attend(layer, q, k, v, c.sliding_windows[layer])
        delta = block.output(attended, layer, adapter, coded=coded)[0]
        x, normed = self._stages.add_norm(x, delta, block.mlp_norm)
        hidden = self._stages.activate(block.up(normed, layer, adapter, coded=coded))
        return x, block.down(hidden, layer, adapter, coded=coded)[0]

    def project_qkv(
        self,
        x: Tensor,
        layer: int,
        adapter: Adapter | None,
        rope: tuple[Tensor, Tensor] | None,
        *,
        decodes: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normed [N, hidden] → rotated queries [N, heads, D], keys and values [N, kv_heads, D].

        `decodes`: it is a step that decodes, by the matrices' codes.
        """
        c = self.config
        joined = self.blocks[layer].qkv.joined(x, layer, adapter, coded=decodes)
        heads = joined.unflatten(-1, (-1, c.head_dim))
        count = heads.shape[1] - c.num_kv_heads
        turning, v = heads[:, :count], heads[:, count:]
        if rope is not None:
            turning = self._stages.rotate(heads, count, *rope)
        return turning[:, : c.num_heads], turning[:, c.num_heads :], v

    def normed(self, x: Tensor) -> Tensor:
        """The final norm over [N, hidden]."""
        return self.final_norm(x)

    def logits(self, normed: Tensor) -> Tensor:
        """[N, hidden] after the final norm → [N, V] float32."""
        return self.head(normed, coded=self._native).contiguous().float()
