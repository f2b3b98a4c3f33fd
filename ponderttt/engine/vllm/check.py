"""Whether a vLLM server can generate for an engine: asked once, before it serves.

The probe is a text whose tokens both sides score, first with the base model and then with an
adapter of random weights. Equal scores say more than names: same weights, same tokens, and that an
adapter takes effect on the blocks where we have it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ponderttt.engine.core import EngineCore
from ponderttt.engine.generator import Adapter
from ponderttt.engine.sampler import prompt_logprobs
from ponderttt.engine.vllm.errors import VllmError
from ponderttt.engine.vllm.generator import VllmGenerator
from ponderttt.errors import PonderError
from ponderttt.fast_weights.adapter import BatchedAdapter
from ponderttt.fast_weights.peft_format import export_adapter

PROBE = '''\
def merge(left: list[int], right: list[int]) -> list[int]:
    """Merge two sorted lists into one."""
    merged = []
    while left and right:
        merged.append(left.pop(0) if left[0] <= right[0] else right.pop(0))
    return merged + left + right
'''
#: Mean difference of log-probabilities, in nats, that float types and kernels may make.
TOLERANCE = 0.1
#: What the probe's adapter changes the scores by, at least and about; see `_random_weights`.
EFFECT = (0.3, 1.0)
OLDEST = (0, 30)
RUNTIME_LORA = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"


class VllmMismatchError(PonderError):
    """The vLLM server can't generate for this engine; the message says how to start it."""


def start_command(model: str, rank: int) -> str:
    """How to start a vLLM server that fits."""
    return (
        f"{RUNTIME_LORA} vllm serve {model} --enable-lora --max-loras 8 --max-lora-rank "
        f"{allowed_rank(rank)}"
    )


def allowed_rank(rank: int) -> int:
    """The least `--max-lora-rank` that vLLM takes and that holds `rank`."""
    return next((allowed for allowed in (8, 16, 32, 64, 128, 256) if allowed >= rank), rank)


def check_version(generator: VllmGenerator) -> None:
    """Refuse a vLLM that is too old.

    Raises:
        VllmMismatchError: older than `OLDEST`.
    """
    found = re.match(r"(\d+)\.(\d+)", generator.version)
    # Builds of no release call themselves anything, 0.0.0 or dev for instance.
    if found and (0, 0) < (int(found[1]), int(found[2])) < OLDEST:
        raise VllmMismatchError(
            f"vLLM at {generator.config.base_url} is version {generator.version}; "
            f"{'.'.join(map(str, OLDEST))} or newer is needed"
        )


def check_fit(core: EngineCore, generator: VllmGenerator) -> None:
    """Refuse a vLLM with another base model, without LoRA, or with too low a rank.

    Raises:
        VllmMismatchError: names the flag to set.
        VllmError: it stopped answering.
    """
    url = generator.config.base_url
    ids = core.tokenizer.encode(PROBE, add_special_tokens=False)
    if generator.tokenize(PROBE) != ids:
        raise _other_model(core, generator, "its tokens differ from ours")
    tokens = tuple(ids)
    fresh = core.bank.fresh_weights
    base = _scores(core, tokens, fresh)
    difference = _mean_difference(base, generator.score(tokens))
    if not difference <= TOLERANCE:
        raise _other_model(
            core,
            generator,
            f"its log-probabilities differ from ours by {difference:.2f} nats a token, and "
            f"float types explain {TOLERANCE:g}",
        )
    weights = _random_weights(core, tokens, base)
    write = partial(_write, core, weights)
    try:
        adapted = generator.score(tokens, Adapter("probe", 1, "0" * 12, write))
    except VllmError as error:
        raise _refusal(core, generator, error) from error
    ours = _scores(core, tokens, weights)
    difference, effect = _mean_difference(ours, adapted), _mean_difference(ours, base)
    if not difference <= TOLERANCE + effect / 10:
        raise VllmMismatchError(
            f"vLLM at {url} loads an adapter, but its log-probabilities then differ from ours by "
            f"{difference:.2f} nats a token (the adapter changes them by {effect:.2f}); see its "
            "log for modules that it leaves out, and choose others with --targets"
        )
    generator.learn_slots()
    generator.forget("probe")


def _scores(core: EngineCore, tokens: Sequence[int], weights: Tensor) -> list[float]:
    """Our log-probabilities of all tokens but the first, under fast weights [P]."""
    model, layout = core.model, core.bank.layout
    count = len(tokens)
    with torch.inference_mode():
        matrices = layout.views(weights.unsqueeze(0))
        adapter = BatchedAdapter(matrices, [0], [count], layout.config.scale)
        batch = model.batch([(model.new_cache(count), 0, count)])
        ids = torch.tensor(tokens, device=model.device)
        x = model.run(model.embed(ids, batch), 0, model.config.num_layers, batch, adapter)
        logits = model.logits(model.normed(x)[:-1])
        return [token.logprob for token in prompt_logprobs(logits, ids[1:], 0)]


def _random_weights(core: EngineCore, tokens: Sequence[int], base: Sequence[float]) -> Tensor:
    """Fast weights [P] that change the scores enough to be noticed, without leaving only noise."""
    bank = core.bank
    noise = torch.randn(bank.layout.size, generator=torch.Generator().manual_seed(0))
    noise = noise.to(bank.fresh_weights)
    low, high = EFFECT
    size = 0.02
    for _ in range(12):
        weights = bank.fresh_weights + size * noise
        effect = _mean_difference(_scores(core, tokens, weights), base)
        if low <= effect <= high:
            break
        # The effect grows a little faster than the weights.
        size *= min(max(math.sqrt(low * high) / max(effect, 1e-6), 0.25), 4.0) ** 0.5
    return weights


def _write(core: EngineCore, weights: Tensor, directory: Path) -> None:
    export_adapter(core.bank.layout, weights, directory, core.model_name)


def _mean_difference(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(left, right, strict=True)) / len(left)


def _other_model(core: EngineCore, generator: VllmGenerator, why: str) -> VllmMismatchError:
    served = generator.base_model
    return VllmMismatchError(
        f"vLLM at {generator.config.base_url} serves {served.name} ({served.root}), which is not "
        f"{core.model_name}: {why}. Start it with the model that --model names, or serve that one"
    )


def _refusal(
    core: EngineCore, generator: VllmGenerator, error: VllmError
) -> VllmMismatchError | VllmError:
    """What to change, by what vLLM said when an adapter was to be loaded."""
    text, rank = str(error), core.bank.layout.config.rank
    head = f"vLLM at {generator.config.base_url} loads no adapter: "
    if "max_lora_rank" in text:
        return VllmMismatchError(
            f"{head}ours have rank {rank}; start it with --max-lora-rank {allowed_rank(rank)}, or "
            f"this server with a lower --rank ({text})"
        )
    if "No adapter found" in text or "Permission denied" in text:
        # A temporary directory is for its user alone.
        seen = "may not read" if "Permission denied" in text else "doesn't see"
        return VllmMismatchError(
            f"{head}it {seen} {generator.adapter_directory}; give a directory that both can "
            "read under the same path with --vllm-adapter-dir"
        )
    if "answers 404" in text:
        return VllmMismatchError(
            f"{head}runtime updating is off; start it with {RUNTIME_LORA} in its environment, and "
            "with --enable-lora"
        )
    if "lora is not enabled" in text.lower() or "lora_manager" in text:
        return VllmMismatchError(f"{head}LoRA is off; start it with --enable-lora ({text})")
    return error
