"""Eight sessions at once, each with its own text: everyone gets what it gets when it runs alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.core import EngineCore
from ponderttt.engine.outputs import ChunkReport
from ponderttt.engine.request import AdaptRequest, GenerateRequest, Request
from ponderttt.engine.sampling_params import SamplingParams
from tests.ponderttt.engine import harness

#: Log-probabilities of a request in a batch against the same request alone. A matrix product sums
#: in another order when it has other rows beside it; logits here reach 50 (1e-5 seen).
LOGPROBS = 1e-4
#: Fast weights: one Adam step moves each number by up to 3e-3, whatever the size of its gradient; a
#: few whose gradient is almost zero differ the most (3e-5 seen).
WEIGHTS = 1e-4
#: Losses, nats per token.
LOSSES = 1e-4


@dataclass(frozen=True)
class Client:
    """One session: what it teaches, and what it asks."""

    name: str
    text: tuple[int, ...]
    teaching: TTTParams
    request: GenerateRequest


@dataclass(frozen=True)
class Got:
    """What a client got."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    taught: list[ChunkReport]
    learned: list[ChunkReport]
    versions: tuple[int, int]
    digest: str
    weights: Tensor


def make_clients(directory: Path, sampling: SamplingParams) -> list[Client]:
    kinds = [
        TTTParams(gate="fixed", adapt_on="prompt", chunk_size=32),
        TTTParams(gate="threshold", adapt_on="prompt", chunk_size=16, budget=2.0),
        TTTParams(gate="fixed", action=Action.UPDATE_2, adapt_on="generated", chunk_size=16),
        TTTParams(gate="threshold", adapt_on="both", chunk_size=32, budget=2.5),
        TTTParams(gate="off"),
        TTTParams(gate="fixed", action=Action.UPDATE_4, adapt_on="both", chunk_size=16, budget=4.0),
        TTTParams(gate="random", adapt_on="prompt", chunk_size=16, seed=3, budget=5.0),
        TTTParams(gate="threshold", adapt_on="generated", chunk_size=16, budget=3.0),
    ]
    clients = []
    for number, ttt in enumerate(kinds):
        name = f"s{number}"
        length = (200, 64, 130, 33, 90, 48, 160, 75)[number]
        prompt = harness.text(directory, 20 + number, (70, 40, 18, 100, 55, 64, 33, 90)[number])
        asked = replace(ttt, session=name)
        draw = replace(sampling, seed=None if sampling.seed is None else sampling.seed + number)
        clients.append(
            Client(
                name,
                harness.text(directory, number, length),
                TTTParams(session=name, gate="fixed", chunk_size=64),
                GenerateRequest(prompt, draw, asked, request_id=name),
            )
        )
    return clients


def strangers(directory: Path) -> list[Request]:
    """Requests of others: the base model, siblings, weights for one request, a scored prompt."""
    off = TTTParams(gate="off")
    return [
        GenerateRequest(harness.text(directory, 40, 120), harness.GREEDY, off),
        GenerateRequest(
            harness.text(directory, 41, 50), SamplingParams(max_tokens=30, n=3, seed=9), off
        ),
        GenerateRequest(
            harness.text(directory, 42, 70), harness.GREEDY, TTTParams(gate="fixed", chunk_size=16)
        ),
        GenerateRequest(
            harness.text(directory, 43, 80), SamplingParams(max_tokens=0, prompt_logprobs=2), off
        ),
    ]


def serve(core: EngineCore, clients: list[Client], others: list[Request]) -> list[Got]:
    """Let clients teach side by side, then ask side by side, among strangers."""
    for client in clients:
        core.sessions.create(client.name, TTTParams())
    lessons = [AdaptRequest((client.text,), client.teaching) for client in clients]
    taught = harness.run(core, *lessons)
    requests: list[Request] = [client.request for client in clients]
    # Strangers before, between and after, so that places in the batch differ.
    for place, other in enumerate(others):
        requests.insert(place * 3, other)
    outcomes = harness.run(core, *requests)
    by_id = {r.request_id: o for r, o in zip(requests, outcomes, strict=True)}
    got = []
    for client, lesson in zip(clients, taught, strict=True):
        answer = by_id[client.name]
        report = answer.report
        got.append(
            Got(
                answer.tokens,
                [[token.logprob for token in row] for row in answer.logprobs],
                list(lesson.report.chunks),
                list(report.chunks),
                (report.version_before, report.version_after),
                report.digest,
                harness.weights(core, client.name),
            )
        )
    return got


@cache
def alone(directory: Path, sampling_seed: int | None) -> list[Got]:
    clients = make_clients(directory, make_sampling(sampling_seed))
    return [serve(harness.make_core(directory), [client], [])[0] for client in clients]


def make_sampling(seed: int | None) -> SamplingParams:
    greedy = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, logprobs=0)
    if seed is None:
        return greedy
    return replace(greedy, temperature=1.0, top_p=0.95, seed=seed, repetition_penalty=1.1)


def _without_figures(report: ChunkReport) -> ChunkReport:
    return replace(report, loss_before=None, loss_after=None, seconds=0.0)


def assert_same_chunks(mine: list[ChunkReport], lone: list[ChunkReport]) -> None:
    assert len(mine) == len(lone)
    for one, two in zip(mine, lone, strict=True):
        assert one.loss_before == pytest.approx(two.loss_before, abs=LOSSES)
        assert one.loss_after == pytest.approx(two.loss_after, abs=LOSSES)
        assert _without_figures(one) == _without_figures(two)


def assert_same(mine: list[Got], lone: list[Got]) -> None:
    for one, two in zip(mine, lone, strict=True):
        assert one.tokens == two.tokens
        torch.testing.assert_close(one.logprobs, two.logprobs, atol=LOGPROBS, rtol=0)
        assert_same_chunks(one.taught, two.taught)
        assert_same_chunks(one.learned, two.learned)
        assert one.versions == two.versions
        torch.testing.assert_close(one.weights, two.weights, atol=WEIGHTS, rtol=0)


@pytest.mark.parametrize(
    ("family", "seed", "among_strangers"),
    [
        ("tiny_llama_dir", None, False),
        ("tiny_llama_dir", None, True),
        ("tiny_llama_dir", 17, True),
        ("tiny_gpt2_dir", 17, True),
    ],
)
def test_sessions_at_once_get_the_same_as_alone(
    family: str, seed: int | None, among_strangers: bool, request: pytest.FixtureRequest
) -> None:
    directory: Path = request.getfixturevalue(family)
    lone = alone(directory, seed)
    clients = make_clients(directory, make_sampling(seed))
    others = strangers(directory) if among_strangers else []
    assert_same(serve(harness.make_core(directory), clients, others), lone)
    # The clients really differ, learn and generate.
    assert len({str(got.tokens) for got in lone}) == len(lone)
    assert sum(got.versions[1] > got.versions[0] for got in lone) >= 6
    assert {len(got.tokens[0]) for got in lone} == {40}
