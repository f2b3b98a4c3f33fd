"""Whose weights answer a prompt: the session's or the base model's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.choice import judged_tokens
from ponderttt.engine.core import EngineCore
from ponderttt.engine.request import GenerateRequest
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.engine.sequence import Status
from ponderttt.errors import InvalidRequestError
from tests.ponderttt.engine import harness
from tests.ponderttt.engine.taught import LEARNED, OTHER, READ, ask, taught


def compared(core: EngineCore, request: GenerateRequest, ttt: TTTParams | None) -> torch.Tensor:
    """Losses of the tokens that are compared, by a scoring request."""
    scoring = SamplingParams(max_tokens=0, prompt_logprobs=0)
    prompt = request.prompt_ids[: judged_tokens(len(request.prompt_ids))]
    (scored,) = harness.run(core, GenerateRequest(prompt, scoring, ttt))
    found = [-token.logprob for token in scored.prompt.logprobs if token is not None]
    rows = torch.linspace(0, len(found) - 1, min(len(found), 128)).long()
    return torch.tensor(found)[rows]


@pytest.fixture(params=["tiny_llama_dir", "tiny_gpt2_dir", "tiny_qwen2_dir"])
def directory(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("length", [90, 200])
@pytest.mark.parametrize("number", range(6))
def test_weights_with_the_lower_loss_on_the_prompt_answer(
    directory: Path, number: int, length: int
) -> None:
    core = taught(directory)
    request = ask(directory, number, length=length)
    (got,) = harness.run(core, request)
    choice = got.report.choice
    assert choice is not None
    session, base = (compared(core, request, ttt) for ttt in (READ, None))
    assert choice.tokens == len(session) == (79 if length < 100 else 128)
    assert choice.session == pytest.approx(float(session.mean()), abs=1e-4)
    assert choice.base == pytest.approx(float(base.mean()), abs=1e-4)
    error = float((session - base).std()) / len(session) ** 0.5
    assert choice.error == pytest.approx(error, rel=1e-2)
    clearly = choice.session + 1.645 * choice.error < choice.base
    assert choice.read == ("session" if clearly else "base")
    ttt = replace(READ, read="session") if choice.read == "session" else None
    (expected,) = harness.run(core, replace(request, request_id="x", ttt=ttt))
    assert got.tokens == expected.tokens


def test_what_was_learned_is_used_where_it_helps_and_only_there(tiny_llama_dir: Path) -> None:
    core = taught(tiny_llama_dir)
    learned, other = harness.run(core, ask(tiny_llama_dir, LEARNED), ask(tiny_llama_dir, OTHER))
    assert learned.report.choice is not None
    assert other.report.choice is not None
    assert (learned.report.choice.read, other.report.choice.read) == ("session", "base")


@pytest.mark.parametrize("cached", [0, 1 << 24])
def test_answers_are_the_same_alone_and_among_others(tiny_llama_dir: Path, cached: int) -> None:
    settings: dict[str, Any] = {"max_batch_tokens": 48, "busy_batch_tokens": 32}
    requests = [ask(tiny_llama_dir, number, length=70 + number) for number in range(8)]
    requests += [ask(tiny_llama_dir, number, None) for number in range(3)]
    core = taught(tiny_llama_dir, prefix_cache_bytes=cached, **settings)
    together = harness.run(core, *requests)
    again = harness.run(core, *(replace(r, request_id=f"again{r.request_id}") for r in requests))
    for request, *outcomes in zip(requests, together, again, strict=True):
        (alone,) = harness.run(taught(tiny_llama_dir, prefix_cache_bytes=0), request)
        for got in outcomes:
            assert got.tokens == alone.tokens
            if alone.done.ttt is not None and alone.report.choice is not None:
                assert got.report.choice is not None
                assert got.report.choice.read == alone.report.choice.read
                assert got.report.choice.base == pytest.approx(alone.report.choice.base, abs=1e-5)
    assert harness.holdings(core)[1] == 0


def rows_read(core: EngineCore, request: GenerateRequest) -> int:
    """In all prefills."""
    recorder = core.observer = harness.Recorder()
    harness.run(core, request)
    return sum(step.tokens for step in recorder.steps if step.kind == "prefill")


@pytest.mark.parametrize("number", [LEARNED, OTHER])
def test_choice_holds_for_a_prompt_that_grows_a_little(tiny_llama_dir: Path, number: int) -> None:
    core = taught(tiny_llama_dir, prefix_cache_bytes=1 << 24)
    first = ask(tiny_llama_dir, number, length=192)
    # Whole, then above the trunk with the base model's weights.
    assert rows_read(core, replace(first, request_id="a")) == 192 + 192
    # By whoever was chosen, the last position for its logits.
    assert rows_read(core, replace(first, request_id="b")) == 1
    assert rows_read(core, ask(tiny_llama_dir, number, length=207)) == 15
    # Judged anew: what is new of the text, and the last position that was known.
    assert rows_read(core, ask(tiny_llama_dir, number, length=208)) == 16 + 16


def test_choice_is_that_of_a_server_that_has_not_seen_the_prompt(tiny_llama_dir: Path) -> None:
    core = taught(tiny_llama_dir)
    for number in range(6):
        for length in (64, 70, 79, 80, 130):
            request = ask(tiny_llama_dir, number, length=length)
            (got,) = harness.run(core, request)
            (expected,) = harness.run(taught(tiny_llama_dir), request)
            assert got.tokens == expected.tokens
            assert (got.report.choice is None) == (expected.report.choice is None)
            if got.report.choice is not None and expected.report.choice is not None:
                assert got.report.choice.read == expected.report.choice.read


def test_choice_is_made_anew_when_the_session_has_learned(tiny_llama_dir: Path) -> None:
    core = taught(tiny_llama_dir)
    request = ask(tiny_llama_dir, OTHER)
    (before,) = harness.run(core, request)
    document = harness.text(tiny_llama_dir, OTHER, 128)
    ttt = TTTParams(session="s", gate="fixed", chunk_size=32, action=Action.UPDATE_4)
    harness.adapt(core, document, ttt=ttt)
    (after,) = harness.run(core, replace(request, request_id="after"))
    assert before.report.choice is not None
    assert after.report.choice is not None
    assert (before.report.choice.read, after.report.choice.read) == ("base", "session")
    assert after.report.choice.base == pytest.approx(before.report.choice.base, abs=1e-5)


def test_prompt_that_is_learned_is_read_by_the_session_whatever_was_chosen(
    tiny_llama_dir: Path,
) -> None:
    # Nothing of it is learned, so that the weights stay what they are.
    learns = TTTParams(session="s", gate="fixed", action=Action.SKIP, chunk_size=32)
    core = taught(tiny_llama_dir)
    outcomes = [
        harness.run(core, ask(tiny_llama_dir, OTHER, ttt))[0] for ttt in (READ, learns, learns)
    ]
    assert len({tuple(got.tokens[0]) for got in outcomes}) == 1
    always = replace(learns, read="session")
    (expected,) = harness.run(core, ask(tiny_llama_dir, OTHER, always))
    for got in outcomes[1:]:
        assert [c.loss_before for c in got.chunks] == pytest.approx(
            [c.loss_before for c in expected.chunks], abs=1e-5
        )


@given(st.integers(min_value=1, max_value=20_000))
def test_nearly_all_of_any_prompt_is_compared(length: int) -> None:
    judged = judged_tokens(length)
    assert judged % 16 == 0
    assert length - max(16, length / 8) < judged <= length


@pytest.mark.parametrize("number", [LEARNED, OTHER])
def test_siblings_go_on_with_what_was_chosen(tiny_llama_dir: Path, number: int) -> None:
    core = taught(tiny_llama_dir)
    sampled: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 7}
    (got,) = harness.run(core, ask(tiny_llama_dir, number, **sampled))
    ttt = replace(READ, read="session") if number == LEARNED else None
    (expected,) = harness.run(core, ask(tiny_llama_dir, number, ttt, **sampled))
    assert got.tokens == expected.tokens
    assert harness.holdings(core)[1] == 0


@pytest.mark.parametrize("when", ["inline", "background"])
def test_session_learns_the_same_whoever_answers(tiny_llama_dir: Path, when: Any) -> None:
    digests = set()
    for read in ("auto", "session"):
        core = taught(tiny_llama_dir)
        both: Any = "both" if when == "background" else "prompt"
        ttt = TTTParams(
            session="s", gate="fixed", chunk_size=32, when=when, adapt_on=both, read=read
        )
        # No answer, so that nothing differs but the order of reading.
        (got,) = harness.run(core, ask(tiny_llama_dir, OTHER, ttt, max_tokens=1))
        assert (got.report.choice is not None) == (read == "auto")
        session = core.sessions.get("s")
        assert session.version == 4 + 3
        digests.add(core.sessions.digest(session))
    assert len(digests) == 1


def test_abort_while_the_rival_reads_gives_back_everything(tiny_llama_dir: Path) -> None:
    core = taught(tiny_llama_dir, max_batch_tokens=20, busy_batch_tokens=20)
    before = harness.holdings(core)
    request = ask(tiny_llama_dir, OTHER)
    got = harness.submit(core, request)
    harness.step_until(
        core, lambda: any(g.rival and g.rival.computed for g in core._lifecycle.running)
    )
    assert core._lifecycle.running[0].sequences[0].status is Status.JUDGED
    core.abort(request.request_id)
    assert harness.holdings(core) == before
    assert not core.has_work
    assert not got.ended


def test_scores_of_the_prompt_are_of_whoever_answers(tiny_llama_dir: Path) -> None:
    core = taught(tiny_llama_dir)
    for _ in range(2):
        (got,) = harness.run(core, ask(tiny_llama_dir, OTHER, prompt_logprobs=0))
        (base,) = harness.run(core, ask(tiny_llama_dir, OTHER, None, prompt_logprobs=0))
        for mine, theirs in zip(got.prompt.logprobs[1:], base.prompt.logprobs[1:], strict=True):
            assert mine is not None
            assert theirs is not None
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_what_is_neither_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="'base' is not one of auto, session"):
        TTTParams(read="base")  # type: ignore[arg-type]


@pytest.mark.parametrize("number", range(1, 9))
def test_prompt_that_teaches_is_judged_alike_whatever_was_asked_before(
    tiny_llama_dir: Path, number: int
) -> None:
    learns = TTTParams(session="s", action=Action.UPDATE_4, chunk_size=16)
    outcomes = []
    for asked_before in (False, True):
        core = taught(tiny_llama_dir)
        if asked_before:
            harness.run(core, ask(tiny_llama_dir, number))
        outcomes += harness.run(core, ask(tiny_llama_dir, number, learns))
    first, second = outcomes
    assert first.report.choice is not None
    assert second.report.choice is not None
    assert second.report.choice.read == first.report.choice.read
    assert second.report.choice.session == pytest.approx(first.report.choice.session, abs=1e-5)
    assert second.tokens == first.tokens


def test_rival_finds_no_more_than_was_looked_up(tiny_llama_dir: Path) -> None:
    core = taught(tiny_llama_dir, prefix_cache_bytes=1 << 24)
    for _ in range(3):
        harness.run(core, ask(tiny_llama_dir, OTHER, length=192))
        core.sessions.get("s").digested = (core.sessions.get("s").version, "another")
    for counts in (core.stats().prefix_trunk, core.stats().prefix_adaptive):
        assert counts.hits <= counts.queries


def test_choice_between_losses_that_are_no_numbers_is_not_remembered(tiny_llama_dir: Path) -> None:
    core = taught(tiny_llama_dir)
    core.bank._weights[core.sessions.get("s").slot].fill_(float("nan"))
    (got,) = harness.run(core, ask(tiny_llama_dir, OTHER))
    assert got.error
    assert not core._phases._choices._made


def test_abort_while_a_chunk_is_to_be_learned_and_the_rival_reads(tiny_llama_dir: Path) -> None:
    core = taught(tiny_llama_dir, max_batch_tokens=20, busy_batch_tokens=20)
    before, session = harness.holdings(core), core.sessions.get("s")
    version = session.version
    # A last chunk of full length, so that it is still to be learned when the prompt has been read.
    ttt = TTTParams(session="s", gate="fixed", chunk_size=96)
    request = ask(tiny_llama_dir, OTHER, ttt, length=96)
    harness.submit(core, request)
    harness.step_until(
        core,
        lambda: any(g.rival is not None and g.write is not None for g in core._lifecycle.running),
    )
    core.abort(request.request_id)
    assert harness.holdings(core) == before
    assert not core.has_work
    assert session.version == version
