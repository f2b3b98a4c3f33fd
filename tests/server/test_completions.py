"""`/v1/completions`, through the official client."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.server.live import PROMPT, Live

GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
OFF = {"ttt": {"gate": "off"}}


def test_completion_greedy_matches_transformers(live: Live, tiny_llama_dir: Any) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    ids = live.core.tokenizer.encode(PROMPT)
    with torch.no_grad():
        out = reference.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
    expected = live.core.tokenizer.decode(out[0, len(ids) :].tolist(), skip_special_tokens=True)
    answer = live.openai.completions.create(
        model=live.model, prompt=PROMPT, **GREEDY, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion"
    assert answer.model == live.model
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == len(ids) + 12


def test_completion_without_max_tokens_makes_sixteen(live: Live) -> None:
    answer = live.openai.completions.create(
        model=live.model, prompt=PROMPT, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_completion_of_token_ids_equals_that_of_their_text(live: Live) -> None:
    ids = live.core.tokenizer.encode(PROMPT)
    of_text = live.openai.completions.create(model=live.model, prompt=PROMPT, **GREEDY)
    of_ids = live.openai.completions.create(model=live.model, prompt=ids, **GREEDY)
    assert of_ids.choices[0].text == of_text.choices[0].text


@pytest.mark.parametrize("form", ["text", "ids"])
def test_several_prompts_and_choices_are_numbered_prompt_by_prompt(live: Live, form: str) -> None:
    prompts = [PROMPT, "import os\n", "class Tree:\n"]
    given: Any = prompts if form == "text" else [live.core.tokenizer.encode(p) for p in prompts]
    together = live.openai.completions.create(
        model=live.model, prompt=given, n=2, seed=3, max_tokens=8
    )
    assert [choice.index for choice in together.choices] == list(range(6))
    for i, prompt in enumerate(prompts):
        alone = live.openai.completions.create(
            model=live.model, prompt=prompt, n=2, seed=3, max_tokens=8
        )
        texts = [choice.text for choice in alone.choices]
        assert [c.text for c in together.choices[2 * i : 2 * i + 2]] == texts
        assert texts[0] != texts[1]
    reports = (together.model_extra or {})["ttt"]
    assert [len(report["chunks"]) for report in reports] == [1, 1, 1]


def test_seed_repeats_a_text_and_another_seed_does_not(live: Live) -> None:
    def sample(seed: int) -> str:
        answer = live.openai.completions.create(
            model=live.model, prompt=PROMPT, seed=seed, max_tokens=24, temperature=1
        )
        return answer.choices[0].text

    assert sample(7) == sample(7)
    assert sample(7) != sample(8)


def test_stop_string_ends_the_text_before_it(live: Live) -> None:
    whole = live.openai.completions.create(model=live.model, prompt=PROMPT, **GREEDY)
    text = whole.choices[0].text
    stop = text[len(text) // 2 :][:3]
    answer = live.openai.completions.create(
        model=live.model, prompt=PROMPT, **GREEDY, stop=[stop, "never\0said"]
    )
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs_describe_each_token(live: Live) -> None:
    answer = live.openai.completions.create(model=live.model, prompt=PROMPT, **GREEDY, logprobs=3)
    choice = answer.choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    count = len(logprobs.tokens)
    assert count == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 12
    for token, logprob, top, offset in zip(
        logprobs.tokens,
        logprobs.token_logprobs,
        logprobs.top_logprobs,
        logprobs.text_offset,
        strict=True,
    ):
        assert len(top) == 3
        assert sum(map(math.exp, top.values())) <= 1 + 1e-6
        # Greedy: the token is the likeliest one.
        assert logprob == top[token] == max(top.values())
        if not token.startswith("bytes:"):
            assert choice.text[offset : offset + len(token)] == token


def test_logprobs_of_an_unlikely_token_are_listed_beside_the_top(live: Live) -> None:
    answer = live.openai.completions.create(
        model=live.model, prompt=PROMPT, max_tokens=1, logprobs=1, logit_bias={"40": 100}
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.tokens == [live.core.tokenizer.decode([40])]
    assert len(logprobs.top_logprobs[0]) == 2


def test_echo_without_new_tokens_scores_the_prompt_as_transformers_does(
    live: Live, tiny_llama_dir: Any
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    ids = torch.tensor([live.core.tokenizer.encode(PROMPT)])
    with torch.no_grad():
        table = torch.log_softmax(reference(ids).logits.float(), dim=-1)[0, :-1]
    expected = table.gather(1, ids[0, 1:, None])[:, 0]
    answer = live.openai.completions.create(
        model=live.model, prompt=PROMPT, max_tokens=0, echo=True, logprobs=1
    )
    choice = answer.choices[0]
    assert choice.text == PROMPT
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens) == PROMPT
    scores = choice.logprobs.token_logprobs
    assert scores is not None
    assert scores[0] is None
    torch.testing.assert_close(torch.tensor(scores[1:]), expected, rtol=0, atol=1e-4)
    best = [max(top.values()) for top in choice.logprobs.top_logprobs[1:]]
    torch.testing.assert_close(torch.tensor(best), table.max(dim=1).values, rtol=0, atol=1e-4)
    offsets = choice.logprobs.text_offset
    assert offsets is not None
    for token, offset in zip(choice.logprobs.tokens, offsets, strict=True):
        assert PROMPT[offset : offset + len(token)] == token


def test_echo_puts_the_prompt_before_the_text_and_moves_offsets(live: Live) -> None:
    prompt = "naïve = '€𝄞'  # ünïcode\n"
    plain = live.openai.completions.create(
        model=live.model, prompt=prompt, **GREEDY, logprobs=0
    ).choices[0]
    echoed = live.openai.completions.create(
        model=live.model, prompt=prompt, **GREEDY, logprobs=0, echo=True
    ).choices[0]
    assert echoed.text == prompt + plain.text
    assert plain.logprobs is not None
    assert echoed.logprobs is not None
    assert echoed.logprobs.tokens is not None
    assert echoed.logprobs.text_offset is not None
    assert plain.logprobs.tokens is not None
    assert plain.logprobs.text_offset is not None
    new = len(plain.logprobs.tokens)
    assert echoed.logprobs.tokens[-new:] == plain.logprobs.tokens
    assert echoed.logprobs.text_offset[-new:] == [
        len(prompt) + offset for offset in plain.logprobs.text_offset
    ]
    given = echoed.logprobs.text_offset[:-new]
    assert given == sorted(given)
    for token, offset in zip(echoed.logprobs.tokens, given, strict=False):
        if not token.startswith("bytes:"):
            assert prompt[offset : offset + len(token)] == token


def test_suffix_asks_for_the_middle_as_the_tokenizer_writes_it(live_coder: Live) -> None:
    ids = live_coder.core.tokenizer.encode_fim("def area(r):\n    return ", "\n\nprint(area(2))")
    by_ids = live_coder.openai.completions.create(
        model=live_coder.model, prompt=ids, **GREEDY, extra_body=OFF
    )
    by_suffix = live_coder.openai.completions.create(
        model=live_coder.model,
        prompt="def area(r):\n    return ",
        suffix="\n\nprint(area(2))",
        **GREEDY,
        extra_body=OFF,
    )
    plain = live_coder.openai.completions.create(
        model=live_coder.model, prompt="def area(r):\n    return ", **GREEDY, extra_body=OFF
    )
    assert by_suffix.choices[0].text == by_ids.choices[0].text != plain.choices[0].text
    assert by_suffix.usage is not None
    assert by_suffix.usage.prompt_tokens == len(ids)


def test_suffix_for_a_model_without_its_tokens_is_refused(live: Live) -> None:
    with pytest.raises(openai.BadRequestError, match="fill-in-the-middle") as caught:
        live.openai.completions.create(model=live.model, prompt="a", suffix="b")
    assert caught.value.param == "suffix"


def test_model_name_may_be_left_out(live: Live) -> None:
    answer = live.http.post("/v1/completions", json={"prompt": PROMPT, **GREEDY})
    assert answer.json()["model"] == live.model


def test_unknown_model_is_not_found_and_names_the_served_one(live: Live) -> None:
    with pytest.raises(openai.NotFoundError, match=live.model) as caught:
        live.openai.completions.create(model="gpt-4", prompt=PROMPT)
    assert caught.value.param == "model"


def test_gate_off_without_session_reports_nothing_learned(live: Live) -> None:
    answer = live.openai.completions.create(
        model=live.model, prompt=PROMPT, **GREEDY, extra_body=OFF
    )
    report = (answer.model_extra or {})["ttt"]
    assert report["gate"] == "off"
    assert report["chunks"] == []
    assert report["session"] is None
