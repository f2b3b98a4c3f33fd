"""`--engine vllm` as clients see it: nothing but the metrics tells the difference."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ponderttt.engine.vllm.check import VllmMismatchError
from ponderttt.errors import InvalidRequestError, PonderError
from server.build import build_core
from server.settings import Settings
from server.settings_sources import load_settings
from tests import helpers
from tests.fake_vllm import FakeVllm, Fault, fake_vllm
from tests.ponderttt.engine import harness
from tests.server.live import PROMPT, Live, live_server


@pytest.fixture(scope="module")
def fake(tiny_llama_dir: Path) -> Iterator[FakeVllm]:
    with fake_vllm(*harness.load(tiny_llama_dir), pace=0.002) as server:
        yield server


@pytest.fixture(scope="module")
def served(tiny_llama_dir: Path, fake: FakeVllm) -> Iterator[Live]:
    with live_server(tiny_llama_dir, engine="vllm", vllm_url=fake.url, vllm_timeout=5) as server:
        yield server


def taught(server: Live) -> str:
    name = server.new_session(gate="fixed", action="UPDATE_1", chunk_size=32)
    server.adapt(name, helpers.source_text()[:600])
    return name


def test_both_engines_give_the_same_answers(served: Live, live: Live) -> None:
    for extra in ({}, {"echo": True, "logprobs": 2}, {"logprobs": 3, "stop": ["e"]}):
        answers = []
        for server in (served, live):
            body = {
                "prompt": [PROMPT, "import os\n"], "max_tokens": 12, "temperature": 0,
                # Where vLLM generates, the session always answers.
                "ttt": {"session": taught(server), "gate": "off", "read": "session"}, **extra,
            }  # fmt: skip
            answer = server.http.post("/v1/completions", json=body).json()
            choices = answer["choices"]
            for choice in choices:
                logprobs = choice.pop("logprobs") or {"token_logprobs": [], "tokens": []}
                choice["tokens"] = logprobs["tokens"]
                choice["values"] = [
                    round(value, 3) for value in logprobs["token_logprobs"] if value is not None
                ]
            answers.append((choices, answer["usage"]["completion_tokens"]))
        values = [[c.pop("values") for c in choices] for choices, _ in answers]
        assert answers[0] == answers[1]
        for ours, theirs in zip(*values, strict=True):
            assert ours == pytest.approx(theirs, abs=2e-3)


def test_stream_and_chat_work(served: Live) -> None:
    stream = served.openai.completions.create(
        model=served.model, prompt=PROMPT, max_tokens=10, temperature=0, stream=True,
        extra_body={"ttt": {"gate": "off"}},
    )  # fmt: skip
    pieces = [event.choices[0] for event in stream]
    assert len(pieces) > 2
    assert pieces[-1].finish_reason == "length"
    chat = served.openai.chat.completions.create(
        model=served.model, messages=[{"role": "user", "content": "hello"}], max_tokens=5
    )
    assert chat.choices[0].finish_reason in ("length", "stop")


def test_model_tells_that_the_session_always_answers(served: Live) -> None:
    (model,) = served.http.get("/v1/models").json()["data"]
    assert (model["ttt"]["engine"], model["ttt"]["read"]) == ("vllm", "session")


def test_client_that_leaves_stops_the_work_in_vllm(served: Live, fake: FakeVllm) -> None:
    before = fake.aborted
    body = {"prompt": PROMPT, "max_tokens": 400, "stream": True, "ttt": {"gate": "off"}}
    with served.http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    until = time.monotonic() + 10
    while fake.aborted == before or fake.running:
        assert time.monotonic() < until, "vLLM goes on"
        time.sleep(0.01)


def test_vllm_that_fails_is_503_and_counted(served: Live, fake: FakeVllm) -> None:
    errors = served.value("vllm_errors_total", kind="unreachable")
    fake.fail("/v1/completions", *[Fault(status=500)] * 5)
    body = {"prompt": PROMPT, "max_tokens": 4, "ttt": {"gate": "off"}}
    answer = served.http.post("/v1/completions", json=body)
    assert answer.status_code == 503
    assert "made to fail" in answer.json()["error"]["message"]
    assert int(answer.headers["Retry-After"]) > 0
    assert served.value("vllm_errors_total", kind="unreachable") == errors + 5
    assert served.http.post("/v1/completions", json=body).status_code == 200


def test_metrics_tell_of_adapters(served: Live) -> None:
    hits, loads = served.value("adapter_hits_total"), served.value("adapter_loads_total")
    published = served.value("adapter_publish_seconds_count")
    name = taught(served)
    served.wait_for("adapter_loads_total", loads + 1)
    ttt = {"session": name, "gate": "off"}
    for _ in range(2):
        served.http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2, "ttt": ttt})
    served.wait_for("adapter_hits_total", hits + 2)
    assert served.value("adapter_publish_seconds_count") == published + 1
    assert served.value("adapters_slots") == 2


def test_context_is_no_longer_than_that_of_vllm(tiny_llama_dir: Path) -> None:
    with fake_vllm(*harness.load(tiny_llama_dir), max_model_len=100) as short:
        settings = Settings(
            model=str(tiny_llama_dir), engine="vllm", vllm_url=short.url, measure_costs=False
        )
        core = build_core(settings)
        core.close()
    assert core.max_model_len == 100


def test_vllm_that_does_not_fit_ends_the_start_with_what_to_do(tiny_llama_dir: Path) -> None:
    model = str(tiny_llama_dir)
    with pytest.raises(InvalidRequestError, match=r"--vllm-url.*vllm serve .* --enable-lora"):
        build_core(Settings(model=model, engine="vllm"))
    nobody = Settings(model=model, engine="vllm", vllm_url="http://127.0.0.1:9")
    with pytest.raises(VllmMismatchError, match=r"can't be reached.*--max-lora-rank 8.*--vllm-url"):
        build_core(nobody)
    with fake_vllm(*harness.load(tiny_llama_dir), max_lora_rank=4) as low:
        settings = Settings(
            model=model, engine="vllm", vllm_url=low.url, rank=8, measure_costs=False
        )
        with pytest.raises(PonderError, match="--max-lora-rank 8"):
            build_core(settings)


def test_key_of_vllm_is_read_from_a_file(tiny_llama_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("secret\n")
    with fake_vllm(*harness.load(tiny_llama_dir), key="secret") as locked:
        settings = Settings(
            model=str(tiny_llama_dir), engine="vllm", vllm_url=locked.url, measure_costs=False
        )
        with pytest.raises(VllmMismatchError, match=r"answers 401.*--vllm-api-key-file"):
            build_core(settings)
        build_core(settings.model_copy(update={"vllm_api_key_file": file})).close()
    with pytest.raises(InvalidRequestError, match=r"vllm_api_key_file: .* is not a file"):
        load_settings({"vllm_api_key_file": str(tmp_path / "missing")})
