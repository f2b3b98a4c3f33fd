"""Positions of KV cache: what requests may need, and what they set aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.config import EngineConfig, TTTDefaults
from ponderttt.engine.kv_reservations import KVReservations
from ponderttt.engine.request import AdaptRequest, GenerateRequest
from ponderttt.engine.resolve import resolve_ttt
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.engine.sequence import Group
from tests.ponderttt.engine import harness

OFF = TTTParams(gate="off")
INLINE = TTTParams(session="s", gate="fixed", when="inline")
BOTH = TTTParams(session="s", gate="fixed", when="inline", adapt_on="both")
LATER = TTTParams(session="s", gate="fixed", when="background", adapt_on="both")


def group(request: GenerateRequest | AdaptRequest, ttt: TTTParams = OFF) -> Group:
    resolved = resolve_ttt(ttt, TTTParams(), TTTDefaults(), "threshold", has_policy=False)
    return Group(request, None, False, resolved, print)


def generate(
    ttt: TTTParams = OFF, length: int = 10, max_tokens: int = 20, **sampling: Any
) -> Group:
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    return group(GenerateRequest((5,) * length, params), ttt)


def adapt(*lengths: int) -> Group:
    return group(AdaptRequest(tuple((5,) * n for n in lengths), TTTParams(session="s")))


@pytest.mark.parametrize(
    ("asked", "judges", "here", "elsewhere"),
    [
        (generate(), False, 30, 0),
        (generate(n=3), False, 90, 0),
        (generate(), True, 60, 0),
        (generate(n=3), True, 90, 0),
        (generate(INLINE), True, 60, 20),
        (generate(INLINE, n=3), True, 120, 20),
        (generate(INLINE), False, 30, 10),
        (generate(BOTH), False, 30, 30),
        (generate(LATER), False, 30, 0),
        (generate(prompt_logprobs=0), False, 30, 10),
        (generate(max_tokens=0), False, 10, 10),
        (adapt(30, 12), False, 30, 30),
        (adapt(500), False, 64, 64),
    ],
)
def test_request_needs_what_is_read_here(
    asked: Group, judges: bool, here: int, elsewhere: int
) -> None:
    for remote, need in ((False, here), (True, elsewhere)):
        kv = KVReservations(EngineConfig(), max_model_len=64, remote=remote)
        assert kv.need(asked, judges) == need


def test_what_was_set_aside_is_given_back() -> None:
    kv = KVReservations(EngineConfig(max_kv_tokens=100), max_model_len=100)
    one, other, document = generate(), generate(), adapt(40)
    for each, need in ((one, 60), (document, 40)):
        assert kv.has_room(each, need)
        kv.reserve(each, need)
    assert kv.reserved == 100
    assert not kv.has_room(other, 1)
    kv.fit(one)
    kv.fit(document)
    assert (one.reserved, document.reserved, kv.reserved) == (30, 40, 70)
    assert kv.has_room(other, 30)
    # Half of all positions are for documents.
    assert not kv.has_room(adapt(11), 11)
    for each in (document, one, one):
        kv.release(each)
    assert (one.reserved, kv.reserved) == (0, 0)
    kv.fit(one)
    assert kv.reserved == 0
    # Alone, a request has room whatever it needs.
    assert kv.has_room(other, 1000)


def test_running_requests_reserve_what_they_may_need_and_no_more(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir, max_num_seqs=4, max_model_len=64)
    core.sessions.create("s", TTTParams(gate="fixed", chunk_size=16, budget=2.5))
    needs = []
    for asked in (generate(), generate(n=3), adapt(30, 12), adapt(500)):
        before = core.stats().kv_tokens
        harness.submit(core, asked.request)
        core._lifecycle.admit()
        needs.append(core.stats().kv_tokens - before)
        harness.drain(core)
    assert needs == [30, 90, 30, 64]


def test_document_reserves_no_more_than_a_window_of_the_kv_cache(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir, max_model_len=100)
    core.sessions.create("s", TTTParams())
    ttt = TTTParams(session="s", gate="fixed", chunk_size=32)
    harness.submit(core, AdaptRequest((harness.text(tiny_llama_dir, 0, 450),), ttt))
    core.step()
    assert core.stats().kv_tokens == 100
    harness.drain(core)
