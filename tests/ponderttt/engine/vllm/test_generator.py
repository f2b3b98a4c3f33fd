"""An engine that a (fake) vLLM server generates for: same answers, adapters, and all that fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.core import EngineCore
from ponderttt.engine.request import AdaptRequest, GenerateRequest
from ponderttt.engine.vllm.config import VllmConfig
from ponderttt.engine.vllm.errors import VllmError, VllmTimeoutError, VllmUnreachableError
from ponderttt.engine.vllm.generator import VllmGenerator
from ponderttt.errors import InvalidRequestError
from tests.fake_vllm import FakeVllm, Fault, fake_vllm, names
from tests.ponderttt.engine import harness

COMPLETIONS, LOAD = "/v1/completions", "/v1/load_lora_adapter"
READ = TTTParams(session="s", gate="off")


@contextmanager
def engine(
    directory: Path, fake: FakeVllm, *sessions: str, **options: Any
) -> Iterator[tuple[EngineCore, VllmGenerator]]:
    """An engine for which a server that is running generates; options are of `VllmConfig`."""
    config = VllmConfig(
        **{"url": fake.url, "retries": (0.05, 0.05, 0.05), "timeout": 5.0, **options}
    )
    generator = VllmGenerator(config)
    core = harness.make_core(directory, generator=generator)
    try:
        generator.learn_slots()
        for name in sessions or ("s",):
            core.sessions.create(name, TTTParams())
        yield core, generator
    finally:
        core.close()


@contextmanager
def trio(
    directory: Path, *sessions: str, timeout: float = 5.0, **options: Any
) -> Iterator[tuple[EngineCore, VllmGenerator, FakeVllm]]:
    """An engine, its generator, and the server behind it; options are the server's."""
    with (
        fake_vllm(*harness.load(directory), **options) as fake,
        engine(directory, fake, *sessions, timeout=timeout) as (core, generator),
    ):
        yield core, generator, fake


def until(core: EngineCore, condition: Callable[[], object], seconds: float = 10.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        if not core.step():
            time.sleep(0.002)
        assert time.monotonic() < limit, "the condition does not hold in time"


def run(core: EngineCore, *requests: GenerateRequest | AdaptRequest) -> list[harness.Outcome]:
    outcomes = [harness.submit(core, request) for request in requests]
    until(core, lambda: not core.has_work)
    return outcomes


def ask(
    directory: Path, ttt: TTTParams = READ, number: int = 0, length: int = 60, **sampling: Any
) -> GenerateRequest:
    params = replace(harness.GREEDY, **sampling)
    return GenerateRequest(harness.text(directory, number, length), params, ttt)


def teach(core: EngineCore, directory: Path, name: str = "s", number: int = 3) -> None:
    document = harness.text(directory, number, 96)
    run(core, AdaptRequest((document,), replace(harness.FIXED, session=name)))


def twin(directory: Path, *taught: int) -> EngineCore:
    """An engine that generates by itself, its session `s` taught the texts of these numbers."""
    core = harness.make_core(directory)
    # Where somebody else generates, the session always answers.
    core.sessions.create("s", TTTParams(read="session"))
    for number in taught:
        harness.adapt(
            core, harness.text(directory, number, 96), ttt=replace(harness.FIXED, session="s")
        )
    return core


def test_greedy_text_is_the_same_whoever_generates(tiny_llama_dir: Path) -> None:
    requests = [ask(tiny_llama_dir, number=n, logprobs=2) for n in range(3)]
    with trio(tiny_llama_dir) as (core, _, fake):
        base = run(core, *requests)
        teach(core, tiny_llama_dir)
        adapted = run(core, *requests)
        assert fake.calls[COMPLETIONS] == 6
    for outcomes, own in ((base, twin(tiny_llama_dir)), (adapted, twin(tiny_llama_dir, 3))):
        for got, expected in zip(outcomes, harness.run(own, *requests), strict=True):
            assert got.tokens == expected.tokens
            assert got.texts == expected.texts
            assert got.report.digest == expected.report.digest
            for a, b in zip(got.logprobs[0], expected.logprobs[0], strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
                assert [t for t, _ in a.top_logprobs] == [t for t, _ in b.top_logprobs]
    assert [got.tokens for got in base] != [got.tokens for got in adapted]


def test_update_takes_effect_on_the_next_request(tiny_llama_dir: Path) -> None:
    with trio(tiny_llama_dir) as (core, _, fake):
        for taught, version in (((3,), 3), ((3, 4), 6)):
            teach(core, tiny_llama_dir, number=taught[-1])
            (got,) = run(core, ask(tiny_llama_dir))
            (expected,) = harness.run(twin(tiny_llama_dir, *taught), ask(tiny_llama_dir))
            assert got.tokens == expected.tokens
            assert got.report.version_before == version
            # The old version went as the new one came.
            assert names(fake) == [("s", version)]
        assert fake.most_loaded == 1


def test_adapter_is_loaded_before_it_is_asked_for(tiny_llama_dir: Path) -> None:
    with trio(tiny_llama_dir) as (core, generator, fake):
        published: list[float] = []
        generator.on_published = published.append
        teach(core, tiny_llama_dir)
        until(core, lambda: generator.counts().loads == 1)
        assert names(fake) == [("s", 3)]
        run(core, ask(tiny_llama_dir))
        counts = generator.counts()
        assert (counts.hits, counts.loads, counts.loaded, counts.slots) == (1, 1, 1, 2)
        assert len(published) == 1
        assert 0 < published[0] < 5


def test_weights_that_live_for_one_request_go_with_it(tiny_llama_dir: Path) -> None:
    with trio(tiny_llama_dir) as (core, _, fake):
        request = ask(tiny_llama_dir, harness.FIXED)
        (got,) = run(core, request)
        assert got.report.version_after == 2
        assert fake.most_loaded == 1
        until(core, lambda: not fake.adapters)


def test_generated_text_is_learned_as_it_grows(tiny_llama_dir: Path) -> None:
    ttt = TTTParams(session="s", gate="fixed", chunk_size=16, adapt_on="generated")
    with trio(tiny_llama_dir) as (core, _, fake):
        (got,) = run(core, ask(tiny_llama_dir, ttt, max_tokens=41))
        assert len(got.tokens[0]) == 41
        assert [(c.start, c.end) for c in got.chunks] == [(60, 76), (76, 92), (92, 100)]
        models = [body["model"].split(".")[:2] for body in fake.bodies]
        assert models == [["tiny"], ["s", "v1"], ["s", "v2"]]
        assert [body["max_tokens"] for body in fake.bodies] == [16, 16, 9]


def test_sampling_parameters_pass_through(tiny_llama_dir: Path) -> None:
    sampling: dict[str, Any] = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 11,
        "presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.1,
        "logit_bias": {5: -3.0}, "stop": ("END",), "stop_token_ids": (9,), "logprobs": 3,
    }  # fmt: skip
    with trio(tiny_llama_dir) as (core, _, fake):
        first, second = run(
            core, *(ask(tiny_llama_dir, TTTParams(gate="off"), **sampling) for _ in range(2))
        )
        assert first.tokens == second.tokens
        body = fake.bodies[0]
    spelt = {"logit_bias": {"5": -3.0}, "stop": ["END"], "stop_token_ids": [9]}
    assert {name: body[name] for name in sampling} == sampling | spelt


def test_least_recently_used_adapter_makes_room(tiny_llama_dir: Path) -> None:
    with trio(tiny_llama_dir, "a", "b", "c", max_loras=2) as (core, generator, fake):
        for number, name in enumerate("abc"):
            teach(core, tiny_llama_dir, name, number)
            run(core, ask(tiny_llama_dir, TTTParams(session=name, gate="off")))
        assert names(fake) == [("b", 3), ("c", 3)]
        run(core, ask(tiny_llama_dir, TTTParams(session="b", gate="off")))
        run(core, ask(tiny_llama_dir, TTTParams(session="a", gate="off")))
        assert names(fake) == [("b", 3), ("a", 3)]
        counts = generator.counts()
        assert (counts.evictions, counts.loaded) == (2, 2)


def test_more_sessions_than_slots_take_turns_and_stay_apart(tiny_llama_dir: Path) -> None:
    with trio(tiny_llama_dir, *"abcde", max_loras=2) as (core, _, fake):
        requests = []
        for number, name in enumerate("abcde"):
            teach(core, tiny_llama_dir, name, number)
            requests.append(ask(tiny_llama_dir, TTTParams(session=name, gate="off")))
        outcomes = run(core, *requests)
        assert fake.most_loaded == 2
    for number, got in enumerate(outcomes):
        (expected,) = harness.run(twin(tiny_llama_dir, number), ask(tiny_llama_dir))
        assert got.tokens == expected.tokens


@pytest.mark.parametrize(
    "fault", [Fault(status=500), Fault(status=503), Fault(after=0), Fault(after=5)], ids=str
)
def test_failure_that_passes_costs_no_token(tiny_llama_dir: Path, fault: Fault) -> None:
    (expected,) = harness.run(twin(tiny_llama_dir), ask(tiny_llama_dir))
    with trio(tiny_llama_dir) as (core, generator, fake):
        fake.fail(COMPLETIONS, fault, fault)
        (got,) = run(core, ask(tiny_llama_dir))
        assert got.tokens == expected.tokens
        counts = generator.counts()
        # A connection that broke may be taken once more, which is a failure of its own.
        assert 2 <= counts.retries <= 4
        assert counts.errors == {"unreachable": counts.retries}


def test_text_under_a_penalty_is_not_resumed_in_the_middle(tiny_llama_dir: Path) -> None:
    with trio(tiny_llama_dir) as (core, _, fake):
        fake.fail(COMPLETIONS, Fault(after=0), Fault(after=3))
        (got,) = run(core, ask(tiny_llama_dir, presence_penalty=0.5))
        assert isinstance(got.error, VllmUnreachableError)
        assert fake.calls[COMPLETIONS] == 2


def test_lasting_failure_is_told_and_the_session_is_as_before(tiny_llama_dir: Path) -> None:
    with trio(tiny_llama_dir) as (core, _, fake):
        teach(core, tiny_llama_dir)
        before = harness.weights(core, "s")
        fake.fail(COMPLETIONS, *[Fault(status=502)] * 4)
        (got,) = run(core, ask(tiny_llama_dir))
        assert isinstance(got.error, VllmError)
        assert "502: made to fail" in str(got.error)
        assert torch.equal(harness.weights(core, "s"), before)
        assert harness.holdings(core)[1:] == (0, {"s": 0})
        (again,) = run(core, ask(tiny_llama_dir))
        (expected,) = harness.run(twin(tiny_llama_dir, 3), ask(tiny_llama_dir))
        assert again.tokens == expected.tokens


def test_server_that_is_down_is_told_at_once_and_learning_goes_on(tiny_llama_dir: Path) -> None:
    with trio(tiny_llama_dir) as (core, generator, fake):
        url = fake.url
        generator._api._http.base_url = "http://127.0.0.1:9"  # nobody listens there
        (got,) = run(core, ask(tiny_llama_dir))
        assert isinstance(got.error, VllmUnreachableError)
        assert "see whether it runs" in str(got.error)
        teach(core, tiny_llama_dir)
        assert core.sessions.get("s").version == 3
        generator._api._http.base_url = url
        (again,) = run(core, ask(tiny_llama_dir))
        assert again.report.version_before == 3


def test_restarted_server_gets_its_adapters_again(tiny_llama_dir: Path) -> None:
    with trio(tiny_llama_dir) as (core, generator, fake):
        teach(core, tiny_llama_dir)
        (before,) = run(core, ask(tiny_llama_dir))
        fake.restart()
        (after,) = run(core, ask(tiny_llama_dir))
        assert after.tokens == before.tokens
        assert names(fake) == [("s", 3)]
        assert generator.counts().errors == {"adapter_gone": 1}


def test_adapter_that_is_refused_is_told_and_tried_again_next_time(tiny_llama_dir: Path) -> None:
    with trio(tiny_llama_dir) as (core, _, fake):
        fake.fail(LOAD, *[Fault(status=500, message="no room for it")] * 5)
        teach(core, tiny_llama_dir)  # published ahead, which fails once
        (got,) = run(core, ask(tiny_llama_dir))
        assert "no room for it" in str(got.error)
        (again,) = run(core, ask(tiny_llama_dir))
        assert again.reasons == {0: "length"}
        fake.fail(LOAD, Fault(status=400, message="bad adapter"))
        teach(core, tiny_llama_dir, number=5)
        until(core, lambda: not fake.faults[LOAD])
        assert core.sessions.get("s").version == 6


def test_silence_is_a_time_out_and_not_asked_again(tiny_llama_dir: Path) -> None:
    with trio(tiny_llama_dir, timeout=0.2) as (core, _, fake):
        fake.fail(COMPLETIONS, Fault(seconds=1.0))
        (got,) = run(core, ask(tiny_llama_dir))
        assert isinstance(got.error, VllmTimeoutError)
        assert "--vllm-timeout" in str(got.error)
        assert fake.calls[COMPLETIONS] == 1


def test_refused_request_is_told_with_the_reason(tiny_llama_dir: Path) -> None:
    with trio(tiny_llama_dir) as (core, _, fake):
        fake.fail(COMPLETIONS, Fault(status=400, message="logprobs above --max-logprobs"))
        (got,) = run(core, ask(tiny_llama_dir))
        assert "logprobs above --max-logprobs" in str(got.error)
        assert fake.calls[COMPLETIONS] == 1


def test_abort_reaches_the_server(tiny_llama_dir: Path) -> None:
    with trio(tiny_llama_dir, pace=0.05) as (core, _, fake):
        teach(core, tiny_llama_dir)
        request = ask(tiny_llama_dir, max_tokens=200)
        got = harness.submit(core, request)
        until(core, lambda: got.events)
        core.abort(request.request_id)
        until(core, lambda: fake.aborted == 1 and fake.running == 0)
        assert not got.ended
        # Its adapter may be unloaded for others again.
        core.sessions.create("t", TTTParams())
        teach(core, tiny_llama_dir, "t")
        core.delete_session("s")
        until(core, lambda: names(fake) == [("t", 3)])


def test_abort_while_an_adapter_is_loading_leaves_none_that_nobody_knows(
    tiny_llama_dir: Path,
) -> None:
    with trio(tiny_llama_dir) as (core, generator, fake):
        teach(core, tiny_llama_dir)
        until(core, lambda: names(fake) == [("s", 3)])
        fake.restart()
        fake.fail(LOAD, Fault(seconds=0.3))
        request = ask(tiny_llama_dir)
        harness.submit(core, request)
        until(core, lambda: fake.calls[LOAD] == 2)
        core.abort(request.request_id)
        until(core, lambda: names(fake) == [("s", 3)] and generator.counts().loads == 2)
        assert generator.counts().loaded == 1
        # The next version knows of it, and takes its place.
        teach(core, tiny_llama_dir, number=4)
        until(core, lambda: names(fake) == [("s", 6)])
        core.delete_session("s")
        until(core, lambda: not fake.adapters)


def test_session_deleted_while_its_adapter_is_loading_leaves_none(tiny_llama_dir: Path) -> None:
    with trio(tiny_llama_dir) as (core, generator, fake):
        fake.fail(LOAD, Fault(seconds=0.3))
        teach(core, tiny_llama_dir)
        until(core, lambda: fake.calls[LOAD] == 1)
        core.delete_session("s")
        until(core, lambda: generator.counts().unloads == 1)
        until(core, lambda: not fake.adapters)


def test_adapter_that_can_not_be_written_is_told_and_harms_no_session(
    tiny_llama_dir: Path,
) -> None:
    with trio(tiny_llama_dir) as (core, generator, _):
        directory = generator.adapter_directory
        directory.rmdir()
        directory.touch()
        teach(core, tiny_llama_dir)
        (got,) = run(core, ask(tiny_llama_dir))
        assert isinstance(got.error, VllmError)
        assert "see whether its disk is full" in str(got.error)
        assert generator.counts().errors["publish"] >= 1
        directory.unlink()
        directory.mkdir()
        (again,) = run(core, ask(tiny_llama_dir))
        assert again.report.version_before == 3
        assert again.reasons == {0: "length"}


def test_closed_generator_takes_its_adapters_along(tiny_llama_dir: Path) -> None:
    with fake_vllm(*harness.load(tiny_llama_dir)) as fake:
        with engine(tiny_llama_dir, fake) as (core, generator):
            teach(core, tiny_llama_dir)
            run(core, ask(tiny_llama_dir))
            assert fake.adapters
            assert generator.adapter_directory.is_dir()
        assert not fake.adapters
        assert not generator.adapter_directory.exists()
        generator.close()


def test_leftovers_of_a_server_that_was_killed_are_unloaded(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    with fake_vllm(*harness.load(tiny_llama_dir)) as fake:
        with engine(tiny_llama_dir, fake, adapter_dir=tmp_path) as (core, generator):
            teach(core, tiny_llama_dir)
            run(core, ask(tiny_llama_dir))
            (name,) = fake.adapters
            left = fake.adapters[name]
            directory = generator.adapter_directory
        (directory / name).mkdir(parents=True)
        fake.adapters = {name: left, "somebody-else's": (Path("/elsewhere"), *left[1:])}
        with engine(tiny_llama_dir, fake, adapter_dir=tmp_path):
            assert list(fake.adapters) == ["somebody-else's"]
            assert list(directory.iterdir()) == []


def test_servers_that_share_a_place_for_adapters_leave_each_other_alone(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    with (
        fake_vllm(*harness.load(tiny_llama_dir)) as fake,
        engine(tiny_llama_dir, fake, adapter_dir=tmp_path) as (core, generator),
    ):
        teach(core, tiny_llama_dir)
        (before,) = run(core, ask(tiny_llama_dir))
        with engine(tiny_llama_dir, fake, "t", adapter_dir=tmp_path) as (other, second):
            assert second.adapter_directory != generator.adapter_directory
            teach(other, tiny_llama_dir, "t", number=5)
            until(other, lambda: sorted(names(fake)) == [("s", 3), ("t", 3)])
        assert names(fake) == [("s", 3)]
        assert not second.adapter_directory.exists()
        (after,) = run(core, ask(tiny_llama_dir))
        assert after.tokens == before.tokens


def test_place_for_adapters_that_can_not_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = VllmConfig("http://127.0.0.1:9", adapter_dir=tmp_path / "file")
    with pytest.raises(InvalidRequestError, match=r"vllm_adapter_dir: .*file can't be written"):
        VllmGenerator(config)


def test_address_where_nobody_listens_is_refused() -> None:
    with pytest.raises(VllmUnreachableError, match=r"127\.0\.0\.1:9 can't be reached"):
        VllmGenerator(VllmConfig("http://127.0.0.1:9"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8001"}, "vllm_url: 'localhost:8001' is not an address"),
        ({"url": "http://h", "timeout": 0.0}, "vllm_timeout: 0.0 must be above 0"),
        ({"url": "http://h", "max_adapters": 0}, "vllm_max_adapters: 0 is below 1"),
    ],
)
def test_bad_setting_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        VllmConfig(**options)


def test_address_may_end_in_v1() -> None:
    assert VllmConfig("http://h:1/v1/").base_url == "http://h:1"
