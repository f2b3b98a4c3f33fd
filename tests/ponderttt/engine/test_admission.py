"""The door: who waits, for what, and what becomes of those who can't begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.request import GenerateRequest
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.errors import NotFoundError, OverloadedError
from ponderttt.models.decoder import Decoder
from tests.ponderttt.engine import harness
from tests.ponderttt.engine.asking import OFF, ask, learn, make_core


def test_requests_beyond_the_slots_of_the_bank_wait_and_then_run(tiny_llama_dir: Path) -> None:
    names = ("a", "b", "c", "d")
    core = make_core(tiny_llama_dir, *names, adapter_slots=2)
    outcomes = [
        harness.submit(core, ask(tiny_llama_dir, n, 40, learn(name)))
        for n, name in enumerate(names)
    ]
    most = 0
    while core.has_work:
        assert core.step()
        pinned = sum(core.sessions.get(name).pins > 0 for name in names)
        most = max(most, pinned)
        assert pinned <= 2
        assert core.stats().bank_occupied <= 2
    assert most == 2
    assert [outcome.report.version_after for outcome in outcomes] == [2] * 4
    assert core.stats().evictions == 2
    for name, outcome in zip(names, outcomes, strict=True):
        alone = make_core(tiny_llama_dir, name)
        lone = harness.run(alone, ask(tiny_llama_dir, names.index(name), 40, learn(name)))[0]
        assert outcome.tokens == lone.tokens
        torch.testing.assert_close(
            harness.weights(core, name), harness.weights(alone, name), atol=1e-4, rtol=0
        )


def test_requests_beyond_the_kv_cache_wait_in_order(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, max_kv_tokens=200)
    requests = [ask(tiny_llama_dir, n, 80) for n in range(3)]
    outcomes = [harness.submit(core, request) for request in requests]
    core.step()
    assert (core.stats().kv_tokens, core.stats().waiting) == (120, 2)
    harness.drain(core)
    assert all(outcome.ended for outcome in outcomes)
    assert core.stats().kv_tokens == 0


def test_requests_beyond_the_sequences_wait_counting_siblings(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, max_num_seqs=4)
    many = GenerateRequest(
        harness.text(tiny_llama_dir, 0, 20), SamplingParams(max_tokens=8, n=3), OFF
    )
    outcomes = [harness.submit(core, r) for r in (many, ask(tiny_llama_dir, 1, 20), many)]
    core.step()
    assert core.stats().waiting == 1
    harness.drain(core)
    assert all(outcome.ended for outcome in outcomes)


def test_queue_beyond_its_limit_refuses(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, max_waiting=2)
    for number in range(2):
        harness.submit(core, ask(tiny_llama_dir, number, 10))
    with pytest.raises(OverloadedError, match="2 requests are waiting"):
        harness.submit(core, ask(tiny_llama_dir, 3, 10))
    assert core.waiting == 2
    harness.drain(core)
    harness.submit(core, ask(tiny_llama_dir, 3, 10))


def test_request_whose_session_is_deleted_while_it_waits_fails_alone(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s", "t")
    recorder = core.observer = harness.Recorder()
    gone = harness.submit(core, ask(tiny_llama_dir, 0, 20, learn("s")))
    stays = harness.submit(core, ask(tiny_llama_dir, 1, 40, learn("t")))
    core.delete_session("s")
    # A new session of the same name is another session.
    core.sessions.create("s", TTTParams())
    harness.drain(core)
    assert isinstance(gone.error, NotFoundError)
    assert "deleted" in str(gone.error)
    assert stays.report.version_after == 2
    assert core.sessions.get("s").version == 0
    assert ("error", 20, 0) in recorder.outcomes


def test_request_for_which_there_is_no_memory_fails_alone(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(tiny_llama_dir, "s")
    before = harness.holdings(core)
    make = Decoder.new_cache

    def scarce(self: Decoder, capacity: int) -> Any:
        if capacity > 200:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return make(self, capacity)

    monkeypatch.setattr(Decoder, "new_cache", scarce)
    small = harness.submit(core, ask(tiny_llama_dir, 0, 20, learn("s")))
    big = harness.submit(core, ask(tiny_llama_dir, 1, 300, learn("s")))
    another = harness.submit(core, ask(tiny_llama_dir, 2, 20))
    harness.drain(core)
    assert "allocate" in str(big.error)
    assert small.ended
    assert another.done.generated_tokens == 40
    assert harness.holdings(core) == (1, 0, {"s": 0})
    assert before[1:] == (0, {"s": 0})
