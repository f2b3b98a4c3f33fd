"""Settings of the engine, fixed when it is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ponderttt.adaptation.actions import Action, CostModelName
from ponderttt.adaptation.params import (
    MAX_CHUNK,
    MIN_CHUNK,
    AdaptOn,
    GateName,
    Read,
    TTTParams,
    When,
)
from ponderttt.adaptation.rules import UpdateRule
from ponderttt.errors import InvalidRequestError
from ponderttt.fast_weights.layout import LoRAConfig
from ponderttt.sessions.config import StoreConfig

#: Tokens of prompt and completion together, where nobody says and the model takes more.
DEFAULT_MODEL_LEN = 8192


@dataclass(frozen=True, slots=True)
class TTTDefaults:
    """Test-time training where neither the request nor its session says otherwise.

    Args:
        gate: None: `policy` where one is loaded for the model, else `threshold`.
        action: of gate `fixed`.
        budget: highest mean cost per chunk, × forward; gate `fixed` ignores it (the caller's own
            budget still holds).
        cost_model, chunk_size, adapt_on, when, read: as in `TTTParams`.
    """

    gate: GateName | None = None
    action: Action = Action.UPDATE_1
    budget: float = 2.0
    cost_model: CostModelName = "nominal"
    chunk_size: int = 256
    adapt_on: AdaptOn = "prompt"
    when: When = "inline"
    read: Read = "auto"

    def __post_init__(self) -> None:
        # The same limits as a request's; only sessions may learn in the background.
        TTTParams(
            session="any",
            gate=self.gate,
            budget=self.budget,
            cost_model=self.cost_model,
            chunk_size=self.chunk_size,
            adapt_on=self.adapt_on,
            when=self.when,
            read=self.read,
        )
        TTTParams(action=self.action)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits and defaults of one engine.

    Args:
        max_model_len: tokens of prompt and completion together; None: the model's own limit, at
            most 8192.
        max_num_seqs: sequences that run at once.
        max_waiting: requests that may wait; more are refused.
        max_wait_seconds: after which a request that still waits is refused; None: never.
        max_kv_tokens: positions that all running sequences may reserve together; each takes the
            keys and values of all blocks, and a hidden state (two in a request that learns).
        prefix_cache_bytes: what is kept of prefixes read before, beside the positions above; on
            the model's device. 0 keeps nothing.
        packed_weights: keep the model's matrices in faster layouts as well, where there are such
            (float32 on a CPU): products 1.1 to 2 times as fast for 2 to 2.5 times the memory.
        native_kernels: decode, and do norms and gates of reading and learning, with kernels in C,
            compiled at the first start, where the machine has gcc and AVX-512; keeps the weights'
            codes as well (0.2 to 0.3 of their memory).
        compile: have `torch.compile` make kernels of what lies between the matrix products, when
            the model is loaded; needs a C++ compiler on a CPU.
        max_batch_tokens: rows of one prefill or write phase when nothing decodes.
        busy_batch_tokens: the same while other sequences decode; bounds the gap in their tokens.
        decode_share: share of the time that decoding gets while prefills or writes wait, too.
        adapter_slots: fast weights that the bank holds at once; sessions beyond them wait in RAM.
        max_sessions: sessions in all.
        store: where sessions are kept; None: in memory only.
        lora: shape of the fast weights; None: the model's calibrated one.
        rule: what a gradient step is; None: the model's calibrated rule.
        ttt: defaults.
        measure_costs: time the actions at start-up (or read the cached figures); without it the
            measured costs are estimated from the share of compute above the boundary.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 16
    max_waiting: int = 256
    max_wait_seconds: float | None = None
    max_kv_tokens: int = 65536
    prefix_cache_bytes: int = 1 << 30
    packed_weights: bool = True
    native_kernels: bool = True
    compile: bool = False
    max_batch_tokens: int = 2048
    busy_batch_tokens: int = 256
    decode_share: float = 0.5
    adapter_slots: int = 32
    max_sessions: int = 256
    store: StoreConfig | None = None
    lora: LoRAConfig | None = None
    rule: UpdateRule | None = None
    ttt: TTTDefaults = field(default_factory=TTTDefaults)
    measure_costs: bool = True

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs", "max_waiting", "max_kv_tokens", "max_batch_tokens",
            "busy_batch_tokens", "adapter_slots", "max_sessions",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise InvalidRequestError(name, f"{getattr(self, name)} is below 1")
        if self.max_wait_seconds is not None and not self.max_wait_seconds > 0.0:
            raise InvalidRequestError(
                "max_wait_seconds",
                f"{self.max_wait_seconds} is not above 0; leave it out for no end",
            )
        if self.prefix_cache_bytes < 0:
            raise InvalidRequestError(
                "prefix_cache_bytes", f"{self.prefix_cache_bytes} is below 0; 0 turns it off"
            )
        if self.max_model_len is not None and self.max_model_len < MIN_CHUNK:
            raise InvalidRequestError("max_model_len", f"{self.max_model_len} is below {MIN_CHUNK}")
        if not 0.0 < self.decode_share < 1.0:
            raise InvalidRequestError("decode_share", f"{self.decode_share} lies outside (0, 1)")
        if self.max_batch_tokens < self.busy_batch_tokens:
            raise InvalidRequestError("busy_batch_tokens", "exceeds max_batch_tokens")
        if self.ttt.chunk_size > MAX_CHUNK:
            raise InvalidRequestError("chunk_size", f"exceeds {MAX_CHUNK}")

    @property
    def max_adapting(self) -> int:
        """Adapt requests that run at once, beside `max_num_seqs` sequences that generate.

        They run for minutes, so completions never wait for one to end: adapt requests have places
        of their own, half of the bank's slots at most, and half of the positions of KV cache.
        """
        return max(min(self.max_num_seqs, self.adapter_slots) // 2, 1)

    @property
    def max_adapting_kv_tokens(self) -> int:
        """Positions of KV cache that adapt requests may reserve together."""
        return max(self.max_kv_tokens // 2, 1)


def served_name(model: str) -> str:
    """The name by which a model's calibration and policy are found: of a directory, its last part.

    Args:
        model: embedded name, scale, hub name or directory.
    """
    path = Path(model).expanduser()
    # `.` and `~/model` have names, too.
    return path.resolve().name if path.exists() else model
