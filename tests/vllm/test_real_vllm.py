"""Both engines of one model give the same, sessions stay apart, and vLLM may crash.

`make test-vllm`. The tests run in this order, since the last ones kill the server.
"""

from __future__ import annotations

import ast
import inspect
import json.decoder
import json.encoder
import textwrap
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ponderttt.engine.vllm.check import VllmMismatchError
from server.build import build_core
from server.settings import Settings
from tests.server.live import Live
from tests.vllm.conftest import FLAGS
from tests.vllm.real_vllm import RealVllm

pytestmark = pytest.mark.vllm

#: Where the two greedy texts part, both tokens must be this near in log-probability, in nats: the
#: sums of float32 come out in another order, so that near-ties may fall either way.
BOUND = 0.01
#: And as long as they agree, so must the log-probabilities.
CLOSE = 0.002


def functions() -> list[str]:
    """Beginnings of functions of the standard library: what an editor would send."""
    texts = []
    for module in (textwrap, ast, json.decoder, json.encoder):
        for _, member in inspect.getmembers(module, inspect.isfunction):
            source = textwrap.dedent(inspect.getsource(member))
            if len(source) > 300:
                texts.append(source[:240])
    return texts


PROMPTS = functions()[:24]
LESSON, SECOND_LESSON = inspect.getsource(textwrap)[:1800], inspect.getsource(json.decoder)[:1800]


def ask(server: Live, prompt: str, session: str | None = None, **options: Any) -> dict[str, Any]:
    """A greedy answer, with the runner-up of each token."""
    body = {
        "prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 2,
        "ttt": {"session": session, "gate": "off", "read": "session"}, **options,
    }  # fmt: skip
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    value: dict[str, Any] = answer.json()
    return value


def ask_all(server: Live, asked: Iterable[tuple[str, str | None]]) -> list[dict[str, Any]]:
    """Answers to (prompt, session), eight at a time."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda each: ask(server, *each), asked))


def compare(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Check that two greedy answers agree, up to a near-tie; returns whether they are the same."""
    left, right = one["choices"][0]["logprobs"], other["choices"][0]["logprobs"]
    steps = zip(
        left["tokens"], right["tokens"], left["token_logprobs"], right["token_logprobs"],
        left["top_logprobs"], strict=True,
    )  # fmt: skip
    for mine, theirs, value, their_value, top in steps:
        if mine != theirs:
            gap = value - top.get(theirs, -99.0)
            assert gap < BOUND, f"{mine!r} and {theirs!r} are {gap} nats apart"
            return False
        assert value == pytest.approx(their_value, abs=CLOSE)
    return True


def taught(server: Live, name: str, *texts: str) -> str:
    """A session that has learned some texts."""
    server.new_session(id=name, gate="fixed", action="UPDATE_1")
    report = server.adapt(name, *texts)
    assert report["version_after"] > 0
    return name


def test_greedy_text_of_both_engines_agrees(through_vllm: Live, by_ourselves: Live) -> None:
    assert len(PROMPTS) >= 20
    for session in (None, "agreement"):
        if session is not None:
            digests = []
            for server in (through_vllm, by_ourselves):
                taught(server, session, LESSON)
                digests.append(server.session(session)["digest"])
            assert digests[0] == digests[1]
        asked = [(prompt, session) for prompt in PROMPTS]
        pairs = zip(ask_all(through_vllm, asked), ask_all(by_ourselves, asked), strict=True)
        same = sum(compare(*pair) for pair in pairs)
        print(f"{same} of {len(PROMPTS)} texts are the same, session {session}")
        assert same >= 0.8 * len(PROMPTS)


def test_session_changes_the_text(through_vllm: Live) -> None:
    sessions: tuple[str | None, ...] = (None, "agreement")
    base, learned = (
        [
            answer["choices"][0]["text"]
            for answer in ask_all(through_vllm, [(prompt, session) for prompt in PROMPTS[:8]])
        ]
        for session in sessions
    )
    assert base != learned


def test_update_takes_effect_on_the_next_request(through_vllm: Live, by_ourselves: Live) -> None:
    answers = {}
    for server in (through_vllm, by_ourselves):
        name = taught(server, "update", LESSON)
        answers[server] = [ask(server, PROMPTS[0], name)]
        server.adapt(name, SECOND_LESSON)
        answers[server].append(ask(server, PROMPTS[0], name))
    before, after = answers[through_vllm]
    assert after["ttt"]["version_before"] > before["ttt"]["version_before"]
    values = [answer["choices"][0]["logprobs"]["token_logprobs"][0] for answer in (before, after)]
    assert abs(values[0] - values[1]) > 2 * CLOSE
    for one, other in zip(answers[through_vllm], answers[by_ourselves], strict=True):
        compare(one, other)


def test_generated_text_is_learned_part_by_part(through_vllm: Live) -> None:
    name = through_vllm.new_session(gate="fixed", action="UPDATE_1", chunk_size=16)
    ttt = {"session": name, "adapt_on": "generated"}
    answer = ask(through_vllm, PROMPTS[1], max_tokens=40, ignore_eos=True, ttt=ttt)
    chunks = answer["ttt"]["chunks"]
    assert [chunk["phase"] for chunk in chunks] == ["generated"] * len(chunks)
    assert answer["ttt"]["version_after"] >= 2
    assert answer["usage"]["completion_tokens"] == 40
    again = ask(through_vllm, PROMPTS[1], name)
    assert again["ttt"]["version_before"] == answer["ttt"]["version_after"]


def test_sampling_passes_through(through_vllm: Live) -> None:
    options: dict[str, Any] = {
        "temperature": 0.9,
        "seed": 7,
        "n": 2,
        "max_tokens": 16,
        "top_p": 0.95,
    }
    first, second = (ask(through_vllm, PROMPTS[2], **options) for _ in range(2))
    texts = [choice["text"] for choice in first["choices"]]
    assert texts == [choice["text"] for choice in second["choices"]]
    assert texts[0] != texts[1]
    stopped = ask(through_vllm, "a b c d e f", max_tokens=40, stop=["\n", "g"], temperature=0)
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert "g" not in stopped["choices"][0]["text"]


def test_client_that_leaves_ends_the_request_in_vllm(through_vllm: Live, vllm: RealVllm) -> None:
    asked = 800
    body = {"prompt": PROMPTS[0], "max_tokens": asked, "stream": True, "ignore_eos": True}
    before = vllm.generated()
    with through_vllm.http.stream(
        "POST", "/v1/completions", json=body | {"ttt": {"gate": "off"}}
    ) as answer:
        assert answer.status_code == 200, answer.read()
        assert any(line.startswith("data: {") for line in answer.iter_lines())
    # Counters, for a gauge says no more than what the last step left behind.
    until = time.monotonic() + 60
    last = -1.0
    while (now := vllm.generated()) != last:
        assert time.monotonic() < until, "vLLM goes on"
        last = now
        time.sleep(2)
    assert 0 < now - before < asked


def test_eight_sessions_at_once_stay_apart(through_vllm: Live, by_ourselves: Live) -> None:
    source = inspect.getsource(ast)
    names = [f"eight-{number}" for number in range(8)]
    for number, name in enumerate(names):
        for server in (through_vllm, by_ourselves):
            taught(server, name, source[number * 1500 : number * 1500 + 700])
    answers = ask_all(through_vllm, [(PROMPTS[3], name) for name in names])
    digests = {answer["ttt"]["digest"] for answer in answers}
    assert len(digests) == 8
    others = ask_all(by_ourselves, [(PROMPTS[3], name) for name in names])
    for alone, answer in zip(others, answers, strict=True):
        assert alone["ttt"]["digest"] == answer["ttt"]["digest"]
        compare(answer, alone)
    first = {tuple(a["choices"][0]["logprobs"]["token_logprobs"]) for a in answers}
    assert len(first) == 8
    # Fewer slots than sessions: they took turns.
    assert through_vllm.value("adapters_slots") == 4
    assert through_vllm.value("adapters_loaded") <= 4
    assert through_vllm.value("adapter_evictions_total") >= 4


def test_vllm_that_was_killed_and_restarted_goes_on(
    through_vllm: Live, vllm: RealVllm, smollm2_dir: Path
) -> None:
    name = "agreement"
    before = ask(through_vllm, PROMPTS[4], name)
    vllm.kill()
    body = {"prompt": PROMPTS[4], "max_tokens": 4, "ttt": {"session": name, "gate": "off"}}
    answer = through_vllm.http.post("/v1/completions", json=body)
    assert answer.status_code == 503
    assert "see whether it runs" in answer.json()["error"]["message"]
    # Learning goes on without it.
    version = through_vllm.session(name)["version"]
    taught(through_vllm, "meanwhile", LESSON[:700])

    # Started wrongly, it is refused by a server that starts now.
    vllm.start()
    settings = Settings(
        model=str(smollm2_dir), engine="vllm", vllm_url=vllm.url, measure_costs=False
    )
    with pytest.raises(VllmMismatchError, match="LoRA is off; start it with --enable-lora"):
        build_core(settings)
    vllm.kill()

    vllm.start(*FLAGS)
    after = ask(through_vllm, PROMPTS[4], name)
    assert after["ttt"]["version_before"] == version
    compare(before, after)
    assert through_vllm.value("vllm_errors_total", kind="adapter_gone") > 0
    assert ask(through_vllm, PROMPTS[4], "meanwhile")["ttt"]["version_before"] > 0

    with pytest.raises(VllmMismatchError, match="rank 32; start it with --max-lora-rank 32"):
        build_core(settings.model_copy(update={"rank": 32}))
