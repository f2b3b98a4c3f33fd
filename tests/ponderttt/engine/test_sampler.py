"""Draws against transformers' logits processors, and what a batch and a seed may not change."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ponderttt.engine import sampler
from ponderttt.engine.sampler import SamplerState, distribution, prompt_logprobs, sample
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.errors import InvalidRequestError

# Quantile 0.999 of chi-squared with 9 degrees of freedom.
CHI_SQUARED_9 = 27.877
FILTERED = SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, seed=3)


def random_logits(*shape: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def draws(logits: Tensor, params: SamplingParams, count: int, child: int = 0) -> list[int]:
    state = SamplerState(params, child=child)
    return [sample(logits[None], [state])[0].token_id for _ in range(count)]


def transformers_distribution(row: Tensor, params: SamplingParams, ids: list[int]) -> Tensor:
    """The same by transformers, in vLLM's order, in float64."""
    warpers = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        warpers.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    scores: Tensor = warpers(torch.tensor([ids], dtype=torch.long), row[None].double())
    return scores[0].softmax(-1)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    vocab=st.sampled_from([1, 7, 300, 3000]),
    scale=st.sampled_from([0.02, 1.0, 6.0]),
    logits_seed=st.integers(0, 2**20),
    temperature=st.floats(0.05, 2.0),
    top_k=st.sampled_from([0, 0, 1, 5, 50, 5000]),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2.0)),
    prompt_tokens=st.integers(1, 30),
)
def test_distribution_of_any_parameters_agrees_with_transformers(
    vocab: int, scale: float, logits_seed: int, prompt_tokens: int, **fields: Any
) -> None:
    row = random_logits(vocab, scale=scale, seed=logits_seed)
    ids = torch.randint(
        vocab, (prompt_tokens + 5,), generator=torch.Generator().manual_seed(logits_seed)
    ).tolist()
    params = SamplingParams(**fields)
    state = SamplerState(params, ids[:prompt_tokens], ids[prompt_tokens:])
    ours = distribution(row, state)
    theirs = transformers_distribution(row, params, ids).float()
    # What float32 can't hold as a normal number may be 0 in one of them.
    assert torch.equal(ours > 1e-35, theirs > 1e-35)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-4)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("top_p", [0.1, 0.95, 0.999999])
def test_distribution_of_top_p_over_a_large_vocabulary_keeps_the_fewest_best_tokens(
    scale: float, top_p: float
) -> None:
    row = random_logits(151_936, scale=scale)
    kept = distribution(row, SamplerState(SamplingParams(top_p=top_p))) > 0
    probs = row.double().softmax(0)
    least = probs[kept].min()
    assert not (probs[~kept] > least).any()
    # With the least of them gone, the rest holds too little.
    assert probs[kept].sum() > top_p - 1e-6
    assert probs[kept].sum() - least < top_p + 1e-6


def test_distribution_of_top_p_reached_exactly_keeps_no_further_token() -> None:
    probs = distribution(torch.zeros(8), SamplerState(SamplingParams(top_p=0.25)))
    assert sorted(probs.tolist()) == [0.0] * 6 + [0.5] * 2


def test_distribution_with_penalties_and_bias_follows_openai_and_vllm() -> None:
    row = torch.tensor([1.0, -2.0, 3.0, 0.5, -0.5, 2.0])
    params = SamplingParams(
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logit_bias={0: -1.5, 5: 3.0},
    )
    state = SamplerState(params, prompt_ids=[0, 1, 2], output_ids=[2, 2, 3])
    # Bias first, then repetition (by sign) on prompt and output, then the two on the output only.
    expected = torch.tensor(
        [
            (1.0 - 1.5) * 2.0,
            -2.0 * 2.0,
            3.0 / 2.0 - 2 * 0.5 - 0.25,
            0.5 / 2.0 - 1 * 0.5 - 0.25,
            -0.5,
            2.0 + 3.0,
        ]
    )
    torch.testing.assert_close(distribution(row, state), expected.softmax(0))


def test_distribution_of_a_growing_output_equals_that_of_a_new_state() -> None:
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=-0.2)
    tokens = torch.randint(500, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    growing = SamplerState(params, prompt_ids=tokens[:50])
    for count, token in enumerate(tokens[50:]):
        row = random_logits(500, seed=count)
        if count % 2:
            growing.observe(token)
        else:
            growing.output_ids.append(token)
        fresh = SamplerState(params, tokens[:50], tokens[50 : 51 + count])
        assert torch.equal(distribution(row, growing), distribution(row, fresh))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e-4},
        {"temperature": 5e-324},
        {"top_p": 5e-324, "top_k": 2},
        {"top_p": math.nextafter(1.0, 0.0), "top_k": 2},
        {"min_p": 5e-324},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 1e-30, "temperature": 1e-4, "presence_penalty": 2.0},
        {"min_p": 1.0, "top_p": 0.5},
    ],
)
def test_distribution_at_extreme_parameters_still_sums_to_one(fields: dict[str, Any]) -> None:
    row = torch.cat([random_logits(300, scale=30.0), torch.tensor([0.0, -0.0, 1e30, -1e30])])
    state = SamplerState(SamplingParams(**fields, seed=1), prompt_ids=list(range(290, 304)))
    probs = distribution(row, state)
    assert probs.isfinite().all()
    assert probs.sum().item() == pytest.approx(1.0)
    assert probs[sample(row[None], [state])[0].token_id] > 0


def test_sample_many_times_follows_the_distribution() -> None:
    row = random_logits(10, scale=1.0, seed=5)
    params = SamplingParams(temperature=0.7, seed=11)
    count = 4000
    seen = torch.bincount(torch.tensor(draws(row, params, count)), minlength=10)
    expected = distribution(row, SamplerState(params)).double() * count
    assert ((seen - expected) ** 2 / expected).sum() < CHI_SQUARED_9


def test_first_draws_of_many_siblings_follow_the_distribution() -> None:
    row = random_logits(10, scale=1.0, seed=5)
    params = SamplingParams(temperature=0.7, seed=11)
    count = 2000
    first = [draws(row, params, 1, child=child)[0] for child in range(count)]
    expected = distribution(row, SamplerState(params)).double() * count
    seen = torch.bincount(torch.tensor(first), minlength=10)
    assert ((seen - expected) ** 2 / expected).sum() < CHI_SQUARED_9


@pytest.mark.parametrize(
    "fields",
    [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"logit_bias": {1: 100.0}, "min_p": 0.5}],
)
def test_sample_with_a_filter_reaches_all_kept_tokens_and_no_other(fields: dict[str, Any]) -> None:
    row = random_logits(20, scale=1.0, seed=9)
    params = SamplingParams(**fields, seed=2)
    kept = set(distribution(row, SamplerState(params)).nonzero().squeeze(1).tolist())
    assert 1 <= len(kept) < 20
    assert set(draws(row, params, 300)) == kept


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (math.nextafter(1.0, 0.0), 2)])
def test_sample_at_the_ends_of_the_unit_interval_takes_a_kept_token(
    uniform: float, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SamplerState(SamplingParams(top_k=2))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(uniform, dtype=torch.float64))
    assert sample(torch.tensor([[0.0, 5.0, 4.0, 0.0]]), [state])[0].token_id == token


def test_sample_of_a_batch_equals_each_row_alone() -> None:
    logits = random_logits(6, 2000)
    params = [
        SamplingParams(temperature=0.0, logprobs=2),
        SamplingParams(seed=1),
        replace(FILTERED, logprobs=5),
        SamplingParams(temperature=0.0, presence_penalty=2.0),
        SamplingParams(seed=4, repetition_penalty=1.5, logit_bias={3: 9.0}, logprobs=5),
        SamplingParams(seed=5, top_p=0.5, logprobs=0),
    ]
    together = [SamplerState(each, prompt_ids=range(50)) for each in params]
    alone = [SamplerState(each, prompt_ids=range(50)) for each in params]
    for step in range(10):
        rows = logits.roll(step, dims=1)
        batch = sample(rows, together)
        single = [sample(rows[i : i + 1], [alone[i]])[0] for i in range(6)]
        for ours, own in zip(batch, single, strict=True):
            assert ours.token_id == own.token_id
            assert ours.logprob == pytest.approx(own.logprob, abs=1e-5)
            assert [i for i, _ in ours.top_logprobs] == [i for i, _ in own.top_logprobs]
        for i in range(6):
            together[i].observe(batch[i].token_id)
            alone[i].observe(single[i].token_id)


def test_sample_of_a_sequence_ignores_its_place_and_neighbours() -> None:
    row = random_logits(1, 500)
    alone = SamplerState(FILTERED)
    expected = [sample(row, [alone])[0].token_id for _ in range(20)]
    moving = SamplerState(FILTERED)
    seen = []
    for step in range(20):
        neighbours = [SamplerState(SamplingParams(seed=step + i)) for i in range(4)]
        logits = random_logits(5, 500, seed=step + 100)
        place = step % 5
        logits[place] = row
        states = [*neighbours[:place], moving, *neighbours[place:]]
        seen.append(sample(logits, states)[place].token_id)
    assert seen == expected


def test_sample_without_temperature_takes_the_most_likely_tokens() -> None:
    logits = random_logits(4, 1000)
    states = [SamplerState(SamplingParams(temperature=0.0)) for _ in range(4)]
    assert [t.token_id for t in sample(logits, states)] == logits.argmax(-1).tolist()
    assert distribution(logits[0], states[0]).nonzero().tolist() == [[int(logits[0].argmax())]]


def test_sample_without_temperature_still_applies_penalties() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.5]])
    state = SamplerState(SamplingParams(temperature=0.0, presence_penalty=1.0))
    tokens = []
    for _ in range(3):
        tokens.append(sample(logits, [state])[0].token_id)
        state.observe(tokens[-1])
    assert tokens == [1, 2, 1]


def test_sample_does_not_change_its_logits() -> None:
    logits = random_logits(1, 300)
    before = logits.clone()
    params = replace(FILTERED, repetition_penalty=2.0, logit_bias={1: 5.0}, logprobs=3)
    sample(logits, [SamplerState(params, prompt_ids=range(100))])
    assert torch.equal(logits, before)


def test_same_seed_gives_the_same_draws() -> None:
    row = random_logits(1000, scale=1.0)
    for seed in (0, 7, -(2**63), 2**63 - 1):
        params = SamplingParams(seed=seed)
        assert draws(row, params, 20) == draws(row, params, 20)


def test_siblings_and_other_seeds_draw_differently() -> None:
    row = random_logits(1000, scale=1.0)
    # Neighbouring seeds and those that agree in their low 32 bits, with two siblings each.
    sequences = {
        tuple(draws(row, SamplingParams(seed=seed), 20, child))
        for seed in (5, 6, 5 + 2**32, -5)
        for child in (0, 1)
    }
    assert len(sequences) == 8


def test_explicit_seed_overrides_the_parameters() -> None:
    row = random_logits(1, 1000, scale=1.0)
    explicit = SamplerState(SamplingParams(seed=1), seed=2)
    named = SamplerState(SamplingParams(seed=2))
    assert explicit.seed == named.seed == 2
    for _ in range(20):
        assert sample(row, [explicit]) == sample(row, [named])


def test_drawn_seed_reproduces_its_sequence() -> None:
    row = random_logits(1000, scale=1.0)
    first, second = SamplerState(SamplingParams()), SamplerState(SamplingParams())
    assert first.seed != second.seed
    seen = [sample(row[None], [first])[0].token_id for _ in range(20)]
    assert draws(row, SamplingParams(seed=first.seed), 20) == seen


@pytest.mark.parametrize(("logprobs", "count"), [(None, 0), (0, 0), (1, 1), (20, 20)])
def test_sampled_logprobs_are_those_of_the_raw_logits(logprobs: int | None, count: int) -> None:
    logits = random_logits(1, 400)
    params = replace(FILTERED, presence_penalty=2.0, repetition_penalty=1.7, logprobs=logprobs)
    token = sample(logits, [SamplerState(params, output_ids=list(range(200)))])[0]
    reference = logits[0].double().log_softmax(0)
    assert token.logprob == pytest.approx(reference[token.token_id].item(), abs=1e-5)
    best = reference.topk(count)
    assert [i for i, _ in token.top_logprobs] == best.indices.tolist()
    assert [p for _, p in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_sampled_logprobs_of_a_small_vocabulary_are_all_there_is() -> None:
    token = sample(torch.zeros(1, 3), [SamplerState(SamplingParams(logprobs=20))])[0]
    assert sorted(i for i, _ in token.top_logprobs) == [0, 1, 2]


@pytest.mark.parametrize("top", [0, 4])
def test_prompt_logprobs_score_the_targets(top: int) -> None:
    logits = random_logits(150, 300)
    targets = torch.randint(300, (150,), generator=torch.Generator().manual_seed(3))
    reference = logits.double().log_softmax(-1)
    scored = prompt_logprobs(logits, targets, top)
    assert [t.token_id for t in scored] == targets.tolist()
    expected = reference.gather(1, targets[:, None]).squeeze(1).tolist()
    assert [t.logprob for t in scored] == pytest.approx(expected, abs=1e-5)
    best = reference.topk(top).indices.tolist()
    assert [[i for i, _ in t.top_logprobs] for t in scored] == best


def test_prompt_logprobs_not_finite_names_the_row() -> None:
    logits = random_logits(150, 30)
    logits[130, 2] = math.nan
    with pytest.raises(FloatingPointError, match="130"):
        prompt_logprobs(logits, torch.zeros(150, dtype=torch.long), 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sample_of_not_finite_logits_raises_and_draws_nothing(
    value: float, temperature: float
) -> None:
    good = random_logits(3, 50)
    bad = good.clone()
    bad[1, 7] = value
    states = [SamplerState(SamplingParams(temperature=temperature, seed=i)) for i in range(3)]
    with pytest.raises(FloatingPointError) as caught:
        sample(bad, states)
    assert isinstance(caught.value, sampler.NonFiniteLogitsError)
    assert caught.value.rows == (1,)
    untouched = [SamplerState(SamplingParams(temperature=temperature, seed=i)) for i in range(3)]
    assert sample(good, states) == sample(good, untouched)


def test_sample_of_other_shapes_is_refused() -> None:
    state = SamplerState(SamplingParams())
    with pytest.raises(ValueError, match="2 sequences"):
        sample(torch.zeros(1, 5), [state, state])
    with pytest.raises(ValueError, match="sequences"):
        sample(torch.zeros(5), [state])
    with pytest.raises(ValueError, match="targets"):
        prompt_logprobs(torch.zeros(3, 5), torch.zeros(2, dtype=torch.long), 0)
    assert sample(torch.zeros(0, 5), []) == []


@pytest.mark.parametrize("token", [-1, 50])
def test_check_logit_bias_outside_the_vocabulary_names_the_limit(token: int) -> None:
    params = SamplingParams(logit_bias={49: 1.0, token: 1.0})
    with pytest.raises(InvalidRequestError, match=r"\[0, 49\]") as caught:
        sampler.check_logit_bias(params, 50)
    assert caught.value.param == f"logit_bias.{token}"
    sampler.check_logit_bias(SamplingParams(logit_bias={0: 1.0, 49: 1.0}), 50)
