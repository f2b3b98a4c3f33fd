"""Observations made by hand, at random and at the edges."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from ponderttt.adaptation.features import FEATURE_NAMES, extract
from ponderttt.adaptation.observation import ChunkObservation, History

MOST_PROBES = 16

TEXTS = (
    "",
    " ",
    "\n\n\n",
    "\ufffd\ufffd",
    "def f(x):\n\treturn x  # done\n",
    "fn main() { let s = r#\"unclosed '\n/* also unclosed",
    '"""',
    "\\",
    "'\\",
    "))))}}}]]",
    "0123456789",
    "é漢字\u2028🙂",
    "--- +++ --- // ://",
)
ACTIVATION_SCALES = (0.0, 1e-38, 1e-3, 1.0, 3e9, 1e30, 3e37)
LOSS_SCALES = (0.0, 1e-6, 3.0, 1e30)


def feature(obs: ChunkObservation, name: str) -> float:
    """One feature, by its place in the vector."""
    return extract(obs)[FEATURE_NAMES.index(name)].item()


def make_observation(
    *,
    tokens: list[int] | None = None,
    context: list[int] | None = None,
    text: str = "x = 1\n",
    chunk_size: int = 16,
    losses: list[float] | None = None,
    probes: list[int] | None = None,
    entropy: list[float] | None = None,
    top1: list[float] | None = None,
    boundary: Tensor | None = None,
    final: Tensor | None = None,
    attention: Tensor | None = None,
    vocab_size: int = 100,
    history: History | None = None,
) -> ChunkObservation:
    """A small plain observation, with what a test is about put in."""
    tokens = [1, 2, 3, 4, 5] if tokens is None else tokens
    context = [] if context is None else context
    count, start = len(tokens), len(context)
    probes = [count - 1] if probes is None else probes
    if attention is None:
        attention = causal_attention(torch.zeros(1, len(probes), start + count), probes, start)
    return ChunkObservation(
        token_ids=torch.tensor(tokens, dtype=torch.int64),
        context_ids=torch.tensor(context, dtype=torch.int64),
        text=text,
        chunk_size=chunk_size,
        losses=torch.tensor([1.0] * (count - (start == 0)) if losses is None else losses),
        probe_positions=torch.tensor(probes, dtype=torch.int64),
        probe_entropy=torch.tensor([1.0] * len(probes) if entropy is None else entropy),
        probe_top1=torch.tensor([0.5] * len(probes) if top1 is None else top1),
        boundary=torch.ones(count, 4) if boundary is None else boundary,
        final=torch.ones(count, 4) if final is None else final,
        attention=attention,
        vocab_size=vocab_size,
        history=History() if history is None else history,
    )


def causal_attention(scores: Tensor, probes: list[int], start: int) -> Tensor:
    """Softmax of scores [H, P, S] over what each probe sees."""
    visible = torch.arange(scores.shape[2]) <= torch.tensor(probes)[:, None] + start
    return scores.masked_fill(~visible, -torch.inf).softmax(dim=2)


def random_observation(
    seed: int,
    *,
    count: int = 96,
    start: int = 32,
    width: int = 24,
    heads: int = 3,
    vocab_size: int = 1000,
    text: str = TEXTS[4],
    activation_scale: float = 1.0,
    loss_scale: float = 3.0,
    sharpness: float = 2.0,
    distinct: int = 50,
    history: History | None = None,
) -> ChunkObservation:
    """An observation with everything drawn from `seed`.

    `sharpness` is the spread of the attention scores, `distinct` the number of different tokens.
    """
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(min(distinct, vocab_size), (start + count,), generator=draw)
    last = max(count - 2, 0)
    probes = [round(i * last / MOST_PROBES) for i in range(MOST_PROBES)] if count > 1 else []
    probes = sorted(set(probes))
    scores = sharpness * torch.randn(heads, len(probes), start + count, generator=draw)
    states = torch.rand(2, count, width, generator=draw) * 2 - 1
    return ChunkObservation(
        token_ids=ids[start:],
        context_ids=ids[:start],
        text=text,
        chunk_size=max(16, count),
        losses=loss_scale * torch.rand(count - (start == 0), generator=draw),
        probe_positions=torch.tensor(probes, dtype=torch.int64),
        probe_entropy=torch.rand(len(probes), generator=draw),
        probe_top1=torch.rand(len(probes), generator=draw),
        boundary=activation_scale * states[0],
        final=activation_scale * states[1],
        attention=causal_attention(scores, probes, start),
        vocab_size=vocab_size,
        history=History() if history is None else history,
    )


@st.composite
def observations(draw: st.DrawFn) -> ChunkObservation:
    """Any chunk: one token or many, with or without a context, ordinary or extreme numbers."""
    chunks = draw(st.integers(0, 10_000))
    budget = draw(st.floats(1.0, 12.0))
    history = History(
        loss_ema=draw(st.sampled_from([0.0, 1.7, 1e30])) if chunks else 0.0,
        cost_ema=draw(st.floats(1.0, 12.0)),
        budget=budget,
        credit=draw(st.floats(-11.0, 11.0)) * chunks,
        ahead=draw(st.integers(0, 10_000)),
    )
    return random_observation(
        draw(st.integers(0, 2**32)),
        count=draw(st.sampled_from([1, 2, 3, 63, 64, 65, 130])),
        start=draw(st.sampled_from([0, 1, 2, 200])),
        width=draw(st.sampled_from([1, 8, 64])),
        heads=draw(st.sampled_from([1, 9])),
        vocab_size=draw(st.sampled_from([2, 50_000])),
        text=draw(st.sampled_from(TEXTS) | st.text(max_size=300)),
        activation_scale=draw(st.sampled_from(ACTIVATION_SCALES)),
        loss_scale=draw(st.sampled_from(LOSS_SCALES)),
        sharpness=draw(st.sampled_from([0.0, 2.0, 1000.0])),
        distinct=draw(st.sampled_from([1, 3, 50_000])),
        history=history,
    )
