"""The engine for programs: what comes back for a prompt, compared with transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.config import EngineConfig
from ponderttt.engine.engine import Completion, Engine, GenerateResult
from ponderttt.engine.outputs import TokenEvent
from ponderttt.engine.request import GenerateRequest
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.errors import InvalidRequestError, NotFoundError, PromptTooLongError
from tests.ponderttt import reference
from tests.ponderttt.engine import harness

OFF = TTTParams(gate="off")
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


def make_engine(directory: Path, **settings: Any) -> Engine:
    return Engine(harness.make_core(directory, **settings))


def generate(
    engine: Engine, prompt: str | tuple[int, ...], sampling: SamplingParams, ttt: TTTParams = OFF
) -> GenerateResult:
    (result,) = engine.generate([prompt], sampling, ttt)
    return result


def only(result: GenerateResult) -> Completion:
    (completion,) = result.completions
    return completion


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", reference.FAMILIES)
def test_greedy_tokens_are_those_of_transformers(
    family: str, request: pytest.FixtureRequest
) -> None:
    directory: Path = request.getfixturevalue(family)
    prompts = [harness.text(directory, n, length) for n, length in enumerate((1, 7, 64, 200))]
    with reference.hf_model(directory) as model:
        expected = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(GREEDY.max_tokens):
                ids.append(int(reference.hf_logits(model, ids)[-1].argmax()))
            expected.append(tuple(ids[len(prompt) :]))
    engine = make_engine(directory, max_batch_tokens=48, busy_batch_tokens=16)
    results = engine.generate(list(prompts), GREEDY, OFF)
    assert [only(result).token_ids for result in results] == expected


@pytest.mark.parametrize("room", [1, 7, 50, 2048])
def test_prompt_read_in_pieces_gives_the_same_tokens(tiny_llama_dir: Path, room: int) -> None:
    prompt = harness.text(tiny_llama_dir, 0, 90)
    whole = only(generate(make_engine(tiny_llama_dir), prompt, GREEDY))
    pieces = make_engine(tiny_llama_dir, max_batch_tokens=room, busy_batch_tokens=room)
    assert only(generate(pieces, prompt, GREEDY)).token_ids == whole.token_ids


def test_sampled_tokens_with_a_seed_are_the_same_again_and_others_without(
    tiny_llama_dir: Path,
) -> None:
    engine, prompt = make_engine(tiny_llama_dir), harness.text(tiny_llama_dir, 0, 30)
    sampling = SamplingParams(max_tokens=20, seed=5, ignore_eos=True)
    first = only(generate(engine, prompt, sampling)).token_ids
    assert only(generate(engine, prompt, sampling)).token_ids == first
    for other in (replace(sampling, seed=6), replace(sampling, seed=None)):
        assert only(generate(engine, prompt, other)).token_ids != first


def test_siblings_with_a_seed_differ_and_the_first_is_the_lone_one(tiny_llama_dir: Path) -> None:
    engine, prompt = make_engine(tiny_llama_dir), harness.text(tiny_llama_dir, 0, 30)
    sampling = SamplingParams(max_tokens=20, seed=5, ignore_eos=True, n=4)
    got = [c.token_ids for c in generate(engine, prompt, sampling).completions]
    assert len(set(got)) == 4
    assert got == [c.token_ids for c in generate(engine, prompt, sampling).completions]
    assert only(generate(engine, prompt, replace(sampling, n=1))).token_ids == got[0]


def test_siblings_that_are_greedy_are_all_the_same_and_learn_the_prompt_once(
    tiny_llama_dir: Path,
) -> None:
    engine = make_engine(tiny_llama_dir)
    ttt = TTTParams(gate="fixed", chunk_size=32)
    got = generate(engine, harness.text(tiny_llama_dir, 0, 64), replace(GREEDY, n=3), ttt)
    lone = generate(engine, harness.text(tiny_llama_dir, 0, 64), GREEDY, ttt)
    assert len({c.token_ids for c in got.completions}) == 1
    assert got.completions[2].token_ids == only(lone).token_ids
    assert got.ttt is not None
    assert got.ttt.version_after == 2


def test_siblings_cannot_all_teach_what_they_generate(tiny_llama_dir: Path) -> None:
    engine = make_engine(tiny_llama_dir)
    ttt = TTTParams(gate="fixed", adapt_on="both")
    with pytest.raises(InvalidRequestError, match="can't all teach") as caught:
        engine.generate([(5, 6)], replace(GREEDY, n=2), ttt)
    assert caught.value.param == "n"


# --- ends -----------------------------------------------------------------------------------------


def test_length_of_a_completion_is_what_was_asked_for(tiny_llama_dir: Path) -> None:
    engine = make_engine(tiny_llama_dir)
    for count in (1, 2, 17):
        got = only(generate(engine, (5, 6, 7), replace(GREEDY, max_tokens=count)))
        assert len(got.token_ids) == count
        assert got.finish_reason == "length"


def test_no_new_tokens_asked_for_gives_none(tiny_llama_dir: Path) -> None:
    engine = make_engine(tiny_llama_dir)
    for count in (1, 3):
        result = generate(engine, (5, 6, 7), replace(GREEDY, max_tokens=0, n=count))
        assert [(c.text, c.token_ids, c.finish_reason) for c in result.completions] == [
            ("", (), "length")
        ] * count


def test_end_of_text_token_ends_the_text_and_is_not_part_of_it(tiny_llama_dir: Path) -> None:
    engine = make_engine(tiny_llama_dir)
    for eos in engine.core.tokenizer.eos_token_ids:
        sampling = replace(GREEDY, logit_bias={eos: 100.0})
        stopped = only(generate(engine, (5, 6, 7), replace(sampling, ignore_eos=False)))
        assert (stopped.text, stopped.token_ids, stopped.finish_reason) == ("", (), "stop")
        going_on = only(generate(engine, (5, 6, 7), sampling))
        assert going_on.token_ids == (eos,) * 24
        assert (going_on.text, going_on.finish_reason) == ("", "length")


def test_stop_token_ends_the_text(tiny_llama_dir: Path) -> None:
    engine, prompt = make_engine(tiny_llama_dir), harness.text(tiny_llama_dir, 0, 30)
    plain = only(generate(engine, prompt, GREEDY)).token_ids
    stop = plain[9]
    got = only(generate(engine, prompt, replace(GREEDY, stop_token_ids=(stop,))))
    assert got.token_ids == plain[: plain.index(stop)]
    assert got.finish_reason == "stop"


def test_stop_string_ends_the_text_before_it_wherever_it_lies(tiny_llama_dir: Path) -> None:
    engine, prompt = make_engine(tiny_llama_dir), harness.text(tiny_llama_dir, 0, 30)
    plain = only(generate(engine, prompt, GREEDY))
    text = plain.text
    assert len(text) > 30
    for start, end in ((5, 6), (8, 12), (10, 25)):
        stop = text[start:end]
        got = only(generate(engine, prompt, replace(GREEDY, stop=("\x00never", stop))))
        assert got.text == text[: text.index(stop)]
        assert got.finish_reason == "stop"
        assert got.token_ids == plain.token_ids[: len(got.token_ids)]
        assert len(got.token_ids) < len(plain.token_ids)


def test_text_in_pieces_is_the_text_of_the_tokens(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir)
    prompt = harness.text(tiny_llama_dir, 0, 30)
    sampling = replace(GREEDY, max_tokens=60, stop=("\x00",), logprobs=2)
    (got,) = harness.run(core, GenerateRequest(prompt, sampling, OFF))
    events = [event for event in got.events if isinstance(event, TokenEvent)]
    assert len(events) > 20
    assert got.texts == [core.tokenizer.decode(got.tokens[0], skip_special_tokens=True)]
    for event in events:
        assert len(event.token_ids) == len(event.offsets) == len(event.logprobs)
        assert [token.token_id for token in event.logprobs] == list(event.token_ids)
        assert all(len(token.top_logprobs) == 2 for token in event.logprobs)
    offsets = [offset for event in events for offset in event.offsets]
    assert offsets == sorted(offsets)


# --- log-probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", reference.FAMILIES)
def test_scored_prompt_has_the_log_probabilities_of_a_full_forward(
    family: str, request: pytest.FixtureRequest
) -> None:
    directory: Path = request.getfixturevalue(family)
    prompt = harness.text(directory, 0, 150)
    engine = make_engine(directory, max_batch_tokens=40, busy_batch_tokens=16)
    result = generate(engine, prompt, SamplingParams(max_tokens=0, prompt_logprobs=3))
    with reference.hf_model(directory) as model:
        logprobs = reference.hf_logits(model, prompt).log_softmax(dim=-1)
    assert result.prompt_logprobs[0] is None
    scored = [token for token in result.prompt_logprobs if token is not None]
    assert [token.token_id for token in scored] == list(prompt[1:])
    expected = logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None]).squeeze(1)
    got = torch.tensor([token.logprob for token in scored])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    best = logprobs[:-1].topk(3, dim=1)
    for row, token in enumerate(scored):
        assert [i for i, _ in token.top_logprobs] == best.indices[row].tolist()


def test_scored_prompt_of_one_token_has_nothing_to_score(tiny_llama_dir: Path) -> None:
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=1)
    assert generate(make_engine(tiny_llama_dir), (5,), sampling).prompt_logprobs == (None,)


def test_scored_prompt_of_siblings_is_reported_once(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir)
    sampling = SamplingParams(max_tokens=3, prompt_logprobs=0, n=3, seed=1)
    got = harness.generate(core, (5, 6, 7, 8), sampling, OFF)
    assert len(got.prompt.logprobs) == 4
    assert got.prompt.token_ids == (5, 6, 7, 8)


def test_generated_log_probabilities_are_those_of_a_full_forward(tiny_llama_dir: Path) -> None:
    prompt = harness.text(tiny_llama_dir, 0, 40)
    sampling = SamplingParams(max_tokens=20, seed=3, temperature=0.7, logprobs=1, ignore_eos=True)
    got = only(generate(make_engine(tiny_llama_dir), prompt, sampling))
    with reference.hf_model(tiny_llama_dir) as model:
        logprobs = reference.hf_logits(model, (*prompt, *got.token_ids)).log_softmax(dim=-1)
    rows = logprobs[39:-1].gather(1, torch.tensor(got.token_ids)[:, None]).squeeze(1)
    mine = torch.tensor([token.logprob for token in got.logprobs])
    torch.testing.assert_close(mine, rows, atol=1e-4, rtol=1e-4)


# --- limits ---------------------------------------------------------------------------------------


def test_prompt_up_to_the_context_window_is_taken_and_no_longer_one(tiny_llama_dir: Path) -> None:
    engine = make_engine(tiny_llama_dir, max_model_len=64)
    prompt = harness.text(tiny_llama_dir, 0, 64)
    assert len(only(generate(engine, prompt[:40], GREEDY)).token_ids) == 24
    only(generate(engine, prompt, replace(GREEDY, max_tokens=0)))
    with pytest.raises(PromptTooLongError, match="65 tokens exceed the context window of 64"):
        generate(engine, (*prompt, 5), replace(GREEDY, max_tokens=0))
    with pytest.raises(PromptTooLongError, match="ask for at most 23") as caught:
        generate(engine, prompt[:41], GREEDY)
    assert caught.value.param == "max_tokens"
    assert not engine.core.has_work


def test_prompts_beyond_the_queue_are_all_answered_in_order(tiny_llama_dir: Path) -> None:
    engine = make_engine(tiny_llama_dir, max_waiting=2, max_num_seqs=2)
    prompts = [harness.text(tiny_llama_dir, n, 5) for n in range(9)]
    short = replace(GREEDY, max_tokens=3)
    results = engine.generate(list(prompts), short, OFF)
    lone = [generate(make_engine(tiny_llama_dir), prompt, short) for prompt in prompts]
    assert [only(r).token_ids for r in results] == [only(r).token_ids for r in lone]


def test_prompts_of_which_one_is_refused_start_none(tiny_llama_dir: Path) -> None:
    engine = make_engine(tiny_llama_dir)
    with pytest.raises(InvalidRequestError, match="empty"):
        engine.generate([(5, 6), ()], GREEDY, OFF)
    assert not engine.core.has_work


def test_request_that_fails_while_it_runs_raises_its_error(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_llama_dir)

    def broken(plan: Any) -> Any:
        raise RuntimeError("the phase broke")

    monkeypatch.setattr(engine.core._phases, "run", broken)
    with pytest.raises(RuntimeError, match="the phase broke"):
        engine.generate([(5, 6)], GREEDY, OFF)
    assert harness.holdings(engine.core) == (0, 0, {})


# --- texts and sessions ---------------------------------------------------------------------------


def test_prompt_as_text_is_that_of_its_tokens(tiny_llama_dir: Path) -> None:
    engine = make_engine(tiny_llama_dir)
    text = "def add(a, b):\n    return"
    ids = tuple(engine.core.tokenizer.encode(text))
    (one,) = engine.generate(text, GREEDY, OFF)
    assert only(one).token_ids == only(generate(engine, ids, GREEDY)).token_ids


def test_session_by_name_is_made_once_and_learns(tiny_llama_dir: Path, tmp_path: Path) -> None:
    engine = make_engine(tiny_llama_dir)
    session = engine.session("my-repo", TTTParams(gate="fixed", chunk_size=32))
    assert engine.session("my-repo").info is session.info
    decode = engine.core.tokenizer.decode
    texts = [decode(list(harness.text(tiny_llama_dir, n, 60))) for n in range(2)]
    reports = session.adapt(*texts)
    assert {report.document for report in reports} == {0, 1}
    assert session.info.version == sum(report.reason == "fixed" for report in reports) >= 2
    (result,) = engine.generate(texts[0], GREEDY, TTTParams(session="my-repo", gate="off"))
    assert result.ttt is not None
    assert result.ttt.version_before == session.info.version
    session.export(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_session_settings_given_with_a_text_hold_for_it_alone(tiny_llama_dir: Path) -> None:
    engine = make_engine(tiny_llama_dir)
    session = engine.session("s", TTTParams(gate="fixed", chunk_size=32))
    text = engine.core.tokenizer.decode(list(harness.text(tiny_llama_dir, 0, 60)))
    assert {r.reason for r in session.adapt(text, ttt=TTTParams(gate="off"))} == {"off"}
    assert "fixed" in {r.reason for r in session.adapt(text)}


def test_session_that_does_not_exist_is_not_found(tiny_llama_dir: Path) -> None:
    engine = make_engine(tiny_llama_dir)
    with pytest.raises(NotFoundError, match="'nobody' does not exist"):
        engine.generate("x", GREEDY, TTTParams(session="nobody"))
    with pytest.raises(NotFoundError):
        engine.adapt("nobody", ["text"])


def test_engine_from_pretrained_loads_a_directory(tiny_llama_dir: Path) -> None:
    config = EngineConfig(measure_costs=False)
    engine = Engine.from_pretrained(str(tiny_llama_dir), config=config)
    lone = only(generate(make_engine(tiny_llama_dir), (5, 6, 7), GREEDY))
    assert only(generate(engine, (5, 6, 7), GREEDY)).token_ids == lone.token_ids
