"""Draws the next token of every sequence in a batch.

Each sequence keeps its own generator and spends one uniform number per token (inverse CDF), so a
draw depends on nothing but its own logits, its own tokens and how many it drew before: neither on
its neighbours in the batch nor on its place among them.

The order of operations is vLLM's: logit bias, repetition, frequency and presence penalty,
temperature, min-p, top-k, top-p; each filter sees what the one before left. Shape letters: B
sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import threshold

from ponderttt.engine.sampler_state import SamplerState, check_logit_bias
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.models.transfer import tensor_on

__all__ = [
    "NonFiniteLogitsError",
    "SampledToken",
    "SamplerState",
    "check_logit_bias",
    "distribution",
    "prompt_logprobs",
    "sample",
]

# exp(-128) is 0 in float32: lower scaled logits change no probability, but may overflow.
_LOWEST = -128.0
# Best tokens looked at first; the nucleus of code is mostly smaller.
_LIKELY = 256
# Bisections of the range of log weights where that is not enough; each halves what is left to sort.
_PROBES = 8
# Rows of prompt logits handled at once: bounds the float32 scratch copy of the log-softmax.
_PROMPT_ROWS = 64


class NonFiniteLogitsError(FloatingPointError):
    """The model gave NaN or an infinity.

    Args:
        rows: the rows of the batch where it did; nothing was drawn for the others either.
    """

    def __init__(self, rows: tuple[int, ...]) -> None:
        super().__init__(f"logits of row(s) {', '.join(map(str, rows))} are not finite")
        self.rows = rows


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token and log-probabilities in nats, of the raw logits: before penalties and temperature.

    Args:
        token_id: the token drawn, or the target of `prompt_logprobs`.
        logprob: its log-probability.
        top_logprobs: the most likely tokens and their log-probabilities, best first.
    """

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


@torch.no_grad()
def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[SampledToken]:
    """Draw one token per sequence; appending it to the sequence's output is left to the caller.

    Args:
        logits: [B, V], of any floating type; computed with in float32.
        states: B sequences; only their generators advance.
    Returns:
        B tokens, each with as many alternatives as its sequence's `logprobs` asks for.
    Raises:
        NonFiniteLogitsError: a FloatingPointError; no generator has advanced then.
        ValueError: B differs between the arguments.
    """
    if logits.ndim != 2 or logits.shape[0] != len(states):
        raise ValueError(f"logits of shape {tuple(logits.shape)} for {len(states)} sequences")
    if not states:
        return []
    logits = logits.float()
    _require_finite(logits)
    if all(state.greedy and not state.changes_logits for state in states):
        tokens = logits.argmax(dim=-1)
    else:
        drawn = [_draw(row, state) for row, state in zip(logits, states, strict=True)]
        tokens = tensor_on(logits.device, drawn)
    return _report(logits, tokens, [state.params.logprobs or 0 for state in states])


@torch.no_grad()
def prompt_logprobs(logits: Tensor, targets: Tensor, top: int) -> list[SampledToken]:
    """Score given tokens, as `echo` and evaluation harnesses need it.

    Args:
        logits: [T, V], of any floating type.
        targets: [T] int64; targets[t] is the token that logits[t] predict (so shifted already).
        top: alternatives to report per token.
    Returns:
        T tokens: the targets with their log-probabilities in nats.
    Raises:
        NonFiniteLogitsError: a FloatingPointError.
        ValueError: T differs between the arguments.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"{tuple(targets.shape)} targets for logits of {tuple(logits.shape)}")
    scored: list[SampledToken] = []
    for start in range(0, len(targets), _PROMPT_ROWS):
        part = logits[start : start + _PROMPT_ROWS].float()
        _require_finite(part, start)
        scored += _report(part, targets[start : start + _PROMPT_ROWS], [top] * len(part))
    return scored


@torch.no_grad()
def distribution(row: Tensor, state: SamplerState) -> Tensor:
    """Probabilities [V] from which `sample` draws, given logits [V]; one-hot where it is greedy."""
    row = state.adjust(row.float())
    if state.greedy:
        return torch.zeros_like(row).index_fill_(0, row.argmax(), 1.0)
    weights = _weights(row, state.params)
    return weights / weights.sum()


def _draw(row: Tensor, state: SamplerState) -> int:
    row = state.adjust(row)
    if state.greedy:
        return int(row.argmax())
    # float64: over 10^5 tokens a float32 sum loses more than the rare ones weigh.
    cdf = _weights(row, state.params).cumsum(0, dtype=torch.float64)
    point = torch.rand((), generator=state.generator, dtype=torch.float64).item() * cdf[-1]
    # `right` finds the first entry above the point, which is never one of weight 0.
    return int(torch.searchsorted(cdf, point, right=True))


def _weights(row: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [V] of the tokens up to a common factor, 0 for those filtered out."""
    scaled = ((row - row.amax()) / params.temperature).clamp_(min=_LOWEST)
    floor = math.log(params.min_p) if params.min_p > 0 else -math.inf
    if 0 < params.top_k < len(scaled):
        # Whatever equals the k-th token stays too, as in transformers and vLLM.
        floor = max(floor, scaled.topk(params.top_k).values[-1].item())
    weights = scaled.softmax(0)
    if floor > _LOWEST:
        weights = torch.where(scaled >= floor, weights, 0.0)
    return _nucleus(weights, params.top_p) if params.top_p < 1.0 else weights


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """The fewest best entries that hold `top_p` of the weight, at least one; 0 for the others.

    Keeps what sorting everything would keep (which of two equals is open), but sorts little: the
    best few hundred where they suffice, else the narrow band in which the target is reached.
    Source: Holtzman et al., arXiv:1904.09751, section 3.1.
    """
    # Above 0 even for the smallest top_p, or nothing would be left.
    target = max(top_p * _total(weights), torch.finfo(torch.float64).tiny)
    best, ids = weights.topk(min(_LIKELY, len(weights)))
    if _total(best) >= target:
        return _fill_up(torch.zeros_like(weights), weights, ids, target)
    # Entries above `low` reach the target, entries above `high` do not.
    low = max(0.999 * weights.amin().item(), torch.finfo(weights.dtype).tiny)
    high = best[-1].item()
    for _ in range(_PROBES):
        middle = math.sqrt(low * high)
        if _total(threshold(weights, middle, 0.0)) >= target:
            low = middle
        else:
            high = middle
    kept = threshold(weights, high, 0.0)
    band = (threshold(weights, low, 0.0) > kept).nonzero().squeeze(1)
    return _fill_up(kept, weights, band[weights[band].argsort(descending=True)], target)


def _total(weights: Tensor) -> float:
    return weights.sum(dtype=torch.float64).item()


def _fill_up(kept: Tensor, weights: Tensor, ids: Tensor, target: float) -> Tensor:
    """Put the weights of `ids`, best first, into `kept` [V] until it holds `target`."""
    ranked = weights[ids]
    before = ranked.cumsum(0, dtype=torch.float64) - ranked + _total(kept)
    chosen = before < target
    return kept.index_put_((ids[chosen],), ranked[chosen])


def _require_finite(logits: Tensor, first_row: int = 0) -> None:
    # The extremes carry NaN along and cost a tenth of looking at each value.
    low, high = torch.aminmax(logits)
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = (~logits.isfinite()).any(dim=-1).nonzero().squeeze(1)
        raise NonFiniteLogitsError(tuple(row + first_row for row in bad.tolist()))


def _report(logits: Tensor, tokens: Tensor, tops: Sequence[int]) -> list[SampledToken]:
    """Raw log-probabilities of `tokens` [B] and of the `tops[b]` best tokens of each row."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
    best: list[tuple[tuple[int, float], ...]] = [()] * len(tops)
    for top in set(tops) - {0}:
        rows = [row for row, wanted in enumerate(tops) if wanted == top]
        values, ids = logprobs[rows].topk(min(top, logprobs.shape[1]))
        for row, row_ids, row_values in zip(rows, ids.tolist(), values.tolist(), strict=True):
            best[row] = tuple(zip(row_ids, row_values, strict=True))
    return [
        SampledToken(token, logprob, alternatives)
        for token, logprob, alternatives in zip(tokens.tolist(), chosen.tolist(), best, strict=True)
    ]
