"""Whose weights answer a prompt: the session's or the base model's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.core import EngineCore
from ponderttt.engine.request import GenerateRequest
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.engine.sequence import Status
from ponderttt.errors import InvalidRequestError
from tests.ponderttt.engine import harness

#: Taught to the session; a prompt of it is predicted better by what was learned, number 5 worse.
LEARNED, OTHER = 3, 5
READ = TTTParams(session="s", gate="off")


def taught(directory: Path, **settings: Any) -> EngineCore:
    core = harness.make_core(directory, **settings)
    core.sessions.create("s", TTTParams())
    document = harness.text(directory, LEARNED, 128)
    harness.adapt(core, document, ttt=replace(harness.FIXED, session="s"))
    return core


def ask(
    directory: Path, number: int, ttt: TTTParams | None = READ, length: int = 90, **sampling: Any
) -> GenerateRequest:
    prompt = harness.text(directory, number, length)
    return GenerateRequest(prompt, replace(harness.GREEDY, **sampling), ttt)


def mean_loss(core: EngineCore, request: GenerateRequest, ttt: TTTParams | None) -> float:
    """Of the prompt, by a scoring request."""
    scoring = SamplingParams(max_tokens=0, prompt_logprobs=0)
    (scored,) = harness.run(core, GenerateRequest(request.prompt_ids, scoring, ttt))
    found = [-token.logprob for token in scored.prompt.logprobs if token is not None]
    return sum(found) / len(found)


@pytest.fixture(params=["tiny_llama_dir", "tiny_gpt2_dir", "tiny_qwen2_dir"])
def directory(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("number", range(8))
def test_weights_with_the_lower_loss_on_the_prompt_answer(directory: Path, number: int) -> None:
    core = taught(directory)
    request = ask(directory, number)
    (got,) = harness.run(core, request)
    choice = got.report.choice
    assert choice is not None
    assert choice.tokens == 89
    assert choice.session == pytest.approx(mean_loss(core, request, READ), abs=1e-4)
    assert choice.base == pytest.approx(mean_loss(core, request, None), abs=1e-4)
    clearly = choice.session + choice.error < choice.base
    assert choice.read == ("session" if clearly else "base")
    always, base = replace(READ, read="session"), None
    (expected,) = harness.run(
        core, replace(request, request_id="x", ttt=always if choice.read == "session" else base)
    )
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


def test_same_prompt_again_is_read_with_neither_weights(tiny_llama_dir: Path) -> None:
    core = taught(tiny_llama_dir, prefix_cache_bytes=1 << 24)
    recorder = core.observer = harness.Recorder()
    read = []
    for name in "ab":
        recorder.steps.clear()
        request = replace(ask(tiny_llama_dir, OTHER, length=192), request_id=name)
        harness.run(core, request)
        read.append([step.tokens for step in recorder.steps if step.kind == "prefill"])
    # Whole, then above the trunk; then the last position of each, for its logits.
    assert read == [[192, 192], [1, 1]]


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


@pytest.mark.parametrize(
    ("ttt", "changes"),
    [
        (replace(READ, read="session"), {}),
        (TTTParams(session="s", gate="fixed", chunk_size=32, adapt_on="both"), {}),
        (READ, {"length": 16}),
        (READ, {"max_tokens": 0}),
        (TTTParams(gate="fixed", chunk_size=32), {}),
    ],
    ids=["asked for", "learns its answer", "too short", "generates nothing", "no session"],
)
def test_nothing_is_compared(tiny_llama_dir: Path, ttt: TTTParams, changes: Any) -> None:
    (got,) = harness.run(taught(tiny_llama_dir), ask(tiny_llama_dir, OTHER, ttt, **changes))
    assert got.report.choice is None


def test_fresh_session_is_the_base_model(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir)
    core.sessions.create("s", TTTParams())
    (got,) = harness.run(core, ask(tiny_llama_dir, OTHER))
    assert got.report.choice is None


def test_session_says_itself_how_it_is_read(tiny_llama_dir: Path) -> None:
    core = taught(tiny_llama_dir)
    core.sessions.get("s").defaults = TTTParams(read="session")
    (got,) = harness.run(core, ask(tiny_llama_dir, OTHER))
    assert got.report.choice is None
    (got,) = harness.run(core, ask(tiny_llama_dir, OTHER, replace(READ, read="auto")))
    assert got.report.choice is not None


def test_prompt_without_room_for_two_readings_is_answered_by_the_session(
    tiny_llama_dir: Path,
) -> None:
    # 90 of the prompt and 12 of the answer.
    for room, compared in ((203, False), (204, True)):
        core = taught(tiny_llama_dir, max_kv_tokens=room)
        (got,) = harness.run(core, ask(tiny_llama_dir, OTHER))
        assert (got.report.choice is not None) == compared


def test_abort_while_the_rival_reads_gives_back_everything(tiny_llama_dir: Path) -> None:
    core = taught(tiny_llama_dir, max_batch_tokens=20, busy_batch_tokens=20)
    before = harness.holdings(core)
    request = ask(tiny_llama_dir, OTHER)
    got = harness.submit(core, request)
    harness.step_until(core, lambda: any(g.rival and g.rival.computed for g in core._running))
    assert core._running[0].sequences[0].status is Status.JUDGED
    core.abort(request.request_id)
    assert harness.holdings(core) == before
    assert not core.has_work
    assert not got.ended


def test_scores_of_the_prompt_are_of_whoever_answers(tiny_llama_dir: Path) -> None:
    core = taught(tiny_llama_dir)
    request = ask(tiny_llama_dir, OTHER, prompt_logprobs=0)
    (got,) = harness.run(core, request)
    found = [-token.logprob for token in got.prompt.logprobs if token is not None]
    assert sum(found) / len(found) == pytest.approx(mean_loss(core, request, None), abs=1e-4)


def test_what_is_neither_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="'base' is not one of auto, session"):
        TTTParams(read="base")  # type: ignore[arg-type]
