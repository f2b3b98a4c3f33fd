"""What is refused, naming field and limit, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.core import EngineCore
from ponderttt.engine.request import AdaptRequest, GenerateRequest, Request
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.errors import InvalidRequestError, NotFoundError, PromptTooLongError
from tests.ponderttt.engine import harness


@pytest.fixture
def core(tiny_llama_dir: Path) -> EngineCore:
    core = harness.make_core(tiny_llama_dir, max_num_seqs=4, max_model_len=64)
    core.sessions.create("s", TTTParams(gate="fixed", chunk_size=16, budget=2.5))
    return core


def generate(prompt: tuple[int, ...] = (5, 6), **sampling: Any) -> GenerateRequest:
    return GenerateRequest(prompt, SamplingParams(**sampling))


def adapt(*documents: tuple[int, ...], session: str | None = "s") -> AdaptRequest:
    return AdaptRequest(documents, TTTParams(session=session))


@pytest.mark.parametrize(
    ("request_", "param", "says"),
    [
        (lambda: generate(()), "prompt", "is empty; give at least one token"),
        (lambda: generate((5, -1)), "prompt", "token id -1 lies outside"),
        (lambda: generate((5, 10**9)), "prompt", "token id 1000000000 lies outside"),
        (lambda: generate(n=5), "n", "5 exceeds the 4 sequences"),
        (lambda: generate(logit_bias={10**6: 1.0}), "logit_bias.1000000", "vocabulary"),
        (lambda: generate(logit_bias={-1: 1.0}), "logit_bias.-1", "vocabulary"),
        (lambda: adapt(), "documents", "is empty; give at least one document"),
        (lambda: adapt((5,), ()), "documents[1].text", "is empty"),
        (lambda: adapt((5, 10**9)), "documents[0].text", "token id 1000000000"),
        (lambda: adapt((5,), session=None), "ttt.session", "needs a session"),
    ],
)
def test_request_with_a_bad_value_is_refused_by_field(
    core: EngineCore, request_: Callable[[], Request], param: str, says: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        core.prepare(request_(), print)
    assert caught.value.param == param
    assert says in str(caught.value)
    assert not core.has_work


@pytest.mark.parametrize(
    ("length", "new", "param"), [(65, 0, "prompt"), (64, 1, "max_tokens"), (1, 64, "max_tokens")]
)
def test_request_beyond_the_context_window_is_too_long(
    core: EngineCore, length: int, new: int, param: str
) -> None:
    with pytest.raises(PromptTooLongError, match="context window of 64") as caught:
        core.prepare(generate((5,) * length, max_tokens=new), print)
    assert caught.value.param == param


def test_request_with_the_last_token_of_the_vocabulary_is_taken(core: EngineCore) -> None:
    last = core.model.config.vocab_size - 1
    core.prepare(generate((0, last)), print)
    with pytest.raises(InvalidRequestError, match=rf"\[0, {last}\]"):
        core.prepare(generate((last + 1,)), print)


@pytest.mark.parametrize("make", [lambda t: GenerateRequest((5,), ttt=t),
                                  lambda t: AdaptRequest(((5,),), t)])  # fmt: skip
def test_request_of_an_unknown_session_is_not_found(
    core: EngineCore, make: Callable[[TTTParams], Request]
) -> None:
    with pytest.raises(NotFoundError, match="'nobody'"):
        core.prepare(make(TTTParams(session="nobody")), print)


def test_request_of_a_session_takes_its_settings(core: EngineCore) -> None:
    group = core.prepare(GenerateRequest((5,), ttt=TTTParams(session="s", budget=3.0)), print)
    assert (group.ttt.gate, group.ttt.chunk_size, group.ttt.budget) == ("fixed", 16, 3.0)
    assert group.named
    document = core.prepare(AdaptRequest(((5,),), TTTParams(session="s")), print)
    assert (document.ttt.budget, document.ttt.when) == (2.5, "inline")


def test_request_that_scores_a_prompt_adapts_only_where_it_is_asked_to(core: EngineCore) -> None:
    scores = SamplingParams(max_tokens=0, prompt_logprobs=1)
    assert core.prepare(GenerateRequest((5,), scores), print).ttt.gate == "off"
    asked = core.prepare(GenerateRequest((5,), scores, TTTParams(gate="fixed")), print)
    assert asked.ttt.gate == "fixed"
    assert core.prepare(GenerateRequest((5,)), print).ttt.gate == "threshold"


def test_document_beyond_the_context_window_is_taken(core: EngineCore) -> None:
    assert core.prepare(adapt((5,) * 1000), print).prompt_tokens == 1000


def test_siblings_that_need_more_than_the_whole_kv_cache_are_refused(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir, max_kv_tokens=100)
    with pytest.raises(InvalidRequestError, match="100 positions") as caught:
        core.prepare(generate((5,) * 60, max_tokens=20, n=3), print)
    assert caught.value.param == "n"
