"""Where vLLM is and how it is talked to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ponderttt.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """One vLLM server.

    Args:
        url: its address, without or with `/v1`.
        adapter_dir: where adapters are published, readable by both under the same path; None: a
            directory of its own, which a vLLM of the same user on the same machine can read.
        timeout: seconds that vLLM gets to send the next token, or to load an adapter.
        max_adapters: adapters that are loaded at once; None: vLLM's `--max-loras`.
        api_key: as vLLM was started with; None: without one.
        retries: seconds to wait before each new attempt, after a failure that may pass.
    """

    url: str
    adapter_dir: Path | None = None
    timeout: float = 60.0
    max_adapters: int | None = None
    api_key: str | None = None
    retries: tuple[float, ...] = (0.1, 0.4, 1.0, 2.0)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidRequestError(
                "vllm_url", f"{self.url!r} is not an address; give one as http://127.0.0.1:8001"
            )
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise InvalidRequestError("vllm_timeout", f"{self.timeout} must be above 0 seconds")
        if self.max_adapters is not None and self.max_adapters < 1:
            raise InvalidRequestError("vllm_max_adapters", f"{self.max_adapters} is below 1")

    @property
    def base_url(self) -> str:
        """The address without `/v1`."""
        return self.url.rstrip("/").removesuffix("/v1")
