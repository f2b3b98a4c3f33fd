"""Which vLLM servers are taken, and what is said of the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ponderttt.engine.core import EngineCore
from ponderttt.engine.vllm.check import (
    VllmMismatchError,
    allowed_rank,
    check_fit,
    check_version,
    start_command,
)
from ponderttt.engine.vllm.config import VllmConfig
from ponderttt.engine.vllm.generator import VllmGenerator
from ponderttt.fast_weights.layout import LoRAConfig
from tests.fake_vllm import FakeVllm, Fault, fake_vllm
from tests.ponderttt.engine import harness


@contextmanager
def connected(
    directory: Path, served: Path | None = None, lora: LoRAConfig | None = None, **options: Any
) -> Iterator[tuple[EngineCore, VllmGenerator, FakeVllm]]:
    """An engine of one checkpoint, and a vLLM server of it or of another one."""
    with fake_vllm(*harness.load(served or directory), **options) as fake:
        generator = VllmGenerator(VllmConfig(fake.url, timeout=5.0))
        core = harness.make_core(
            directory, generator=generator, lora=lora or LoRAConfig(layers=2, targets="all")
        )
        try:
            yield core, generator, fake
        finally:
            core.close()


def refusal(*args: Any, **options: Any) -> str:
    """What is said of a server that is not taken."""
    with connected(*args, **options) as (core, generator, _):
        try:
            check_version(generator)
            check_fit(core, generator)
        except VllmMismatchError as error:
            return str(error)
    raise AssertionError("it was taken")


@pytest.mark.parametrize("targets", ["mlp", "all"])
def test_server_of_the_same_model_is_taken(tiny_llama_dir: Path, targets: str) -> None:
    lora = LoRAConfig(layers=2, targets=targets)
    with connected(tiny_llama_dir, lora=lora, max_loras=5) as (core, generator, fake):
        check_version(generator)
        check_fit(core, generator)
        assert generator.counts().slots == 5
    assert not fake.adapters


def test_server_of_another_model_is_refused(tiny_llama_dir: Path, tiny_mistral_dir: Path) -> None:
    # The same tokenizer and shapes, other weights.
    said = refusal(tiny_llama_dir, tiny_mistral_dir)
    assert "serves tiny (/models/tiny), which is not tiny: its log-probabilities differ" in said
    assert "--model" in said


def test_server_with_another_tokenizer_is_refused(
    tiny_llama_dir: Path, tiny_qwen2_dir: Path
) -> None:
    assert "its tokens differ from ours" in refusal(tiny_llama_dir, tiny_qwen2_dir)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_lora_rank": 4}, "ours have rank 8; start it with --max-lora-rank 8"),
        ({"runtime_updating": False}, "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ({"enable_lora": False}, "LoRA is off; start it with --enable-lora"),
        ({"version": "0.29.9"}, "is version 0.29.9; 0.30 or newer is needed"),
        ({"version": "0.6.3.post1"}, "is version 0.6.3.post1; 0.30 or newer is needed"),
    ],
)
def test_server_that_loads_no_adapter_is_refused_with_the_flag_to_set(
    tiny_llama_dir: Path, options: dict[str, Any], message: str
) -> None:
    assert message in refusal(tiny_llama_dir, **options)


def test_server_that_does_not_see_the_adapters_is_refused(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ponderttt.engine.vllm.check.export_adapter", lambda *args: args[2].mkdir())
    assert "with --vllm-adapter-dir" in refusal(tiny_llama_dir)


def test_server_of_a_user_who_may_not_read_the_adapters_is_refused(tiny_llama_dir: Path) -> None:
    # The words of vLLM 0.32: Python's error, passed on.
    said = "[Errno 13] Permission denied: '/tmp/x/adapter_config.json'"
    faults = {"/v1/load_lora_adapter": deque([Fault(status=500, message=said)])}
    message = refusal(tiny_llama_dir, faults=faults)
    assert "it may not read /" in message
    assert "with --vllm-adapter-dir" in message


def test_server_on_which_adapters_have_no_effect_is_refused(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tests.fake_vllm.import_adapter", lambda layout, directory, fresh: fresh.clone()
    )
    assert "loads an adapter, but its log-probabilities then differ" in refusal(tiny_llama_dir)


@pytest.mark.parametrize("version", ["0.30.0", "0.32.1rc2", "1.0", "0.0.0+local", "dev"])
def test_new_or_unnumbered_version_is_taken(tiny_llama_dir: Path, version: str) -> None:
    with connected(tiny_llama_dir, version=version) as (_, generator, _):
        check_version(generator)


@pytest.mark.parametrize(("rank", "allowed"), [(1, 8), (8, 8), (9, 16), (200, 256), (300, 300)])
def test_command_names_a_rank_that_vllm_takes(rank: int, allowed: int) -> None:
    assert allowed_rank(rank) == allowed
    assert start_command("m", rank).endswith(f"--max-lora-rank {allowed}")
