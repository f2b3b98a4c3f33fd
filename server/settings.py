"""Everything that can be set when the server starts.

Each field is an option of `ponderttt serve`, an environment variable `PONDERTTT_<FIELD>` and a key
of the TOML file; `server.settings_sources` reads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from ponderttt.adaptation.actions import CostModelName
from ponderttt.adaptation.params import (
    MAX_BUDGET,
    MAX_CHUNK,
    MIN_BUDGET,
    MIN_CHUNK,
    AdaptOn,
    GateName,
    Read,
    When,
)
from ponderttt.sessions.locks import LEASE_SECONDS
from server.logs import LogFormat

ENV_PREFIX = "PONDERTTT_"

ActionName = Literal["SKIP", "UPDATE_1", "UPDATE_2", "UPDATE_4"]
Panel = Literal["Model", "Learning", "Sessions", "Limits", "Server", "Cluster"]


def setting(panel: Panel, default: Any, description: str, **limits: Any) -> Any:
    """A setting; `panel` is its heading in --help."""
    extra: dict[str, Any] = {"panel": panel}
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Settings(BaseSettings):
    """Settings of one server, fixed when it starts. Unknown keys are refused."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    model: str = setting(
        "Model",
        "qwen2.5-coder-0.5b",
        "Embedded model (smollm2-135m, qwen2.5-coder-0.5b), scale (125m, 350m, 1b), hub name "
        "or directory.",
    )
    device: str = setting("Model", "cpu", "Device of PyTorch: cpu, cuda or cuda:N.")
    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "Model", "float32", "Floating-point type of the weights."
    )
    engine: Literal["torch", "vllm"] = setting(
        "Model",
        "torch",
        "What generates: this process (torch), or a vLLM server that serves the same model, while "
        "this process decides and learns.",
    )
    vllm_url: str | None = setting(
        "Model", None, "Address of the vLLM server, such as http://127.0.0.1:8001."
    )
    vllm_adapter_dir: Path | None = setting(
        "Model",
        None,
        "Directory for adapters, which vLLM reads under the same path; by default a temporary one, "
        "for a vLLM of the same user on this machine.",
    )
    vllm_timeout: float = setting(
        "Model", 60.0, "Seconds that vLLM gets to send a token, or to load an adapter.", gt=0
    )
    vllm_max_adapters: int | None = setting(
        "Model",
        None,
        "Adapters loaded in vLLM at once; by default its --max-loras, as its metrics tell.",
        ge=1,
    )
    vllm_api_key_file: Path | None = setting(
        "Model", None, "File with the key that vLLM was started with (--api-key)."
    )
    threads: int | None = setting(
        "Model", None, "CPU threads of PyTorch; by default PyTorch chooses.", ge=1, le=1024
    )

    gate: GateName | None = setting(
        "Learning",
        None,
        "Who decides how hard to ponder a chunk; by default policy where one is loaded, else "
        "threshold.",
    )
    policy: Path | None = setting("Learning", None, "Directory of a trained policy.")
    budget: float = setting(
        "Learning",
        2.0,
        "Highest mean cost per chunk, in multiples of its forward.",
        ge=MIN_BUDGET,
        le=MAX_BUDGET,
    )
    cost_model: CostModelName = setting(
        "Learning", "nominal", "Costs in which the budget is counted."
    )
    chunk_size: int = setting("Learning", 256, "Tokens per chunk.", ge=MIN_CHUNK, le=MAX_CHUNK)
    adapt_on: AdaptOn = setting(
        "Learning", "prompt", "Learn the prompt, the generated text, or both."
    )
    when: When = setting(
        "Learning",
        "inline",
        "Learn each chunk before reading on (inline), or answer first and learn in idle time "
        "(background; requests with a session).",
    )
    read: Read = setting(
        "Learning",
        "auto",
        "Answer with a session's weights where they predict the prompt clearly better than the "
        "base model's, else with those (auto), or always with the session's (session; engine vllm "
        "knows no other).",
    )
    action: ActionName = setting("Learning", "UPDATE_1", "Action of gate fixed.")
    calibration: Path | None = setting(
        "Learning",
        None,
        "File with the shape of the fast weights and the update rule; by default the model's "
        "calibrated ones. The next five options change single values of it.",
    )
    learning_rate: float | None = setting(
        "Learning", None, "Learning rate; by default the calibrated one.", gt=0
    )
    rank: int | None = setting(
        "Learning", None, "Rank of the fast weights (LoRA); by default the calibrated one.", ge=1
    )
    alpha: float | None = setting(
        "Learning",
        None,
        "Fast weights are scaled by alpha / rank; by default the calibrated one.",
        gt=0,
    )
    adaptive_layers: int | None = setting(
        "Learning", None, "Top blocks that adapt; by default the calibrated number.", ge=1
    )
    targets: str | None = setting(
        "Learning",
        None,
        "Projections that adapt: mlp, all, or names separated by commas (q_proj,v_proj); by "
        "default the calibrated ones.",
    )
    measure_costs: bool = setting(
        "Learning", True, "Time the actions at start-up instead of estimating their cost."
    )

    sessions: str | None = setting(
        "Sessions",
        None,
        "Where sessions are kept: a directory, a URL of fsspec (s3://bucket/prefix), or memory; by "
        "default a directory of the model below PONDERTTT_DATA or the user's data directory.",
    )
    session_versions: int = setting(
        "Sessions", 3, "Versions kept of each session to go back to.", ge=1, le=1000
    )
    session_write_delay: float = setting(
        "Sessions",
        2.0,
        "Seconds after which what a session has learned is handed to the store at the latest.",
        ge=0,
        le=3600,
    )
    session_idle_seconds: float = setting(
        "Sessions",
        600.0,
        "Seconds after which the store alone holds an unused session, and any server may take it.",
        ge=0,
    )
    session_ttl: float | None = setting(
        "Sessions",
        None,
        "Seconds after which an unused session is deleted; by default never.",
        gt=0,
    )
    session_lease_seconds: float = setting(
        "Sessions",
        LEASE_SECONDS,
        "Seconds after which another server may take over the sessions of one that died, where the "
        "store is not a local directory (there it may at once). Clocks must agree to a fraction "
        "of it.",
        ge=1,
        le=3600,
    )
    ram_sessions: int = setting(
        "Sessions",
        64,
        "Sessions outside the bank whose fast weights stay in RAM; the others are read from the "
        "store when they are needed.",
        ge=0,
    )

    max_model_len: int | None = setting(
        "Limits",
        None,
        "Tokens of prompt and completion together; by default the model's own limit, at most 8192.",
        ge=MIN_CHUNK,
    )
    max_num_seqs: int = setting("Limits", 16, "Sequences that run at once.", ge=1)
    max_waiting: int = setting(
        "Limits", 256, "Requests that may wait; more are answered with 429.", ge=1
    )
    max_waiting_per_key: int | None = setting(
        "Limits",
        None,
        "Requests of one API key that may wait, where the key file says nothing; by default half "
        "of --max-waiting.",
        ge=1,
    )
    max_wait_seconds: float = setting(
        "Limits",
        300.0,
        "Seconds after which a request that still waits is answered with 429.",
        gt=0,
    )
    max_kv_tokens: int = setting(
        "Limits", 65536, "Positions of KV cache that running sequences share.", ge=1
    )
    prefix_cache_bytes: int = setting(
        "Limits",
        1 << 30,
        "Bytes kept of prefixes that were read before; 0 keeps nothing. Clients share them: how "
        "soon an answer comes tells whether somebody sent the same prefix lately.",
        ge=0,
    )
    packed_weights: bool = setting(
        "Limits",
        True,
        "Keep the model's matrices in faster layouts as well (float32 on a CPU): products 1.1 to 2 "
        "times as fast for 2 to 2.5 times the memory of the weights.",
    )
    native_kernels: bool = setting(
        "Limits",
        True,
        "Decode, and do norms and gates of reading and learning, with kernels in C, compiled at "
        "the first start, where the machine has gcc and AVX-512; keeps the weights' codes as well "
        "(0.2 to 0.3 of their memory).",
    )
    compile: bool = setting(
        "Model",
        False,
        "Have torch.compile make kernels of what lies between the matrix products, at start-up; "
        "needs a C++ compiler on a CPU, where it is not faster.",
    )
    max_batch_tokens: int = setting(
        "Limits", 2048, "Rows of a prefill or write phase when nothing decodes.", ge=1
    )
    busy_batch_tokens: int = setting(
        "Limits",
        256,
        "The same while other sequences decode; bounds the gap in their tokens.",
        ge=1,
    )
    decode_share: float = setting(
        "Limits",
        0.5,
        "Share of the time that decoding gets while prefills or writes wait.",
        gt=0,
        lt=1,
    )
    adapter_slots: int = setting(
        "Limits",
        32,
        "Sessions whose fast weights are in the bank at once; the others wait in RAM.",
        ge=1,
    )
    max_sessions: int = setting("Limits", 256, "Sessions kept at most.", ge=1)
    max_sessions_per_key: int | None = setting(
        "Limits",
        None,
        "Sessions of one API key, where the key file says nothing; by default half of "
        "--max-sessions.",
        ge=0,
    )
    max_body_bytes: int = setting(
        "Limits", 8 * 1024 * 1024, "Bytes of a request's body; more are answered with 413.", ge=1024
    )
    chat_max_tokens: int = setting(
        "Limits",
        1024,
        "New tokens of a chat completion that names no limit (less where the context ends).",
        ge=1,
    )

    host: str = setting("Server", "127.0.0.1", "Address to listen on.")
    api_key_file: Path | None = setting(
        "Server",
        None,
        "TOML file of API keys, as `ponderttt keys new` prints them; read again when it changes. "
        "Without one everybody who reaches the server may use all of it.",
    )
    allow_unauthenticated: bool = setting(
        "Server",
        False,
        "Listen without API keys on an address that other machines can reach.",
    )
    port: int = setting("Server", 8000, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    drain_seconds: float = setting(
        "Server", 30.0, "Seconds that running requests get to finish after SIGTERM.", ge=0
    )
    stalled_reader_seconds: float = setting(
        "Server",
        60.0,
        "Seconds for which the reader of a stream may take nothing before it is cut off.",
        gt=0,
    )
    log_format: LogFormat = setting(
        "Server",
        "text",
        "Lines for people (text) or an object per line (json); neither holds prompts or answers.",
    )
    log_level: Literal["critical", "error", "warning", "info", "debug"] = setting(
        "Server", "info", "Least severity that is logged; from info on, every request is."
    )

    @field_validator("vllm_api_key_file")
    @classmethod
    def _key_is_there(cls, file: Path | None) -> Path | None:
        if file is not None and not file.expanduser().is_file():
            raise ValueError(f"{file} is not a file; give one that holds vLLM's key")
        return file.expanduser() if file is not None else None

    @field_validator("sessions")
    @classmethod
    def _sessions_have_a_place(cls, sessions: str | None) -> str | None:
        if sessions is not None and not sessions.strip():
            raise ValueError("is empty; give a directory, a URL, or memory")
        return sessions

    @field_validator("policy")
    @classmethod
    def _policy_is_there(cls, policy: Path | None) -> Path | None:
        if policy is not None and not policy.expanduser().is_dir():
            raise ValueError(f"{policy} is not a directory; give one with policy.json")
        return policy.expanduser() if policy is not None else None

    @field_validator("api_key_file")
    @classmethod
    def _expand_user(cls, path: Path | None) -> Path | None:
        return path.expanduser() if path is not None else None

    @field_validator("calibration")
    @classmethod
    def _calibration_is_there(cls, calibration: Path | None) -> Path | None:
        if calibration is not None and not calibration.expanduser().is_file():
            raise ValueError(f"{calibration} is not a file; give a calibration in JSON")
        return calibration.expanduser() if calibration is not None else None

    @property
    def hand_over_seconds(self) -> float | None:
        """How often to look whether another server asks for an idle session; None: never."""
        return None

    @property
    def waiting_per_key(self) -> int:
        """Requests that may wait of a key without a limit of its own."""
        return self.max_waiting_per_key or max(self.max_waiting // 2, 1)

    @property
    def sessions_per_key(self) -> int:
        """Sessions of a key without a limit of its own."""
        if self.max_sessions_per_key is not None:
            return self.max_sessions_per_key
        return max(self.max_sessions // 2, 1)
