"""Requests whose prefix was read before: nothing but their cost may differ."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.gates import Decision
from ponderttt.adaptation.params import TTTParams, When
from ponderttt.engine.core import EngineCore
from ponderttt.engine.outputs import PromptEvent
from ponderttt.engine.prefix_cache import PrefixCounts, TrunkBlock, chain_keys
from ponderttt.engine.request import AdaptRequest, GenerateRequest, Request
from ponderttt.engine.sampler import SampledToken
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.fast_weights.bank import AdapterState
from tests.ponderttt.engine import harness

OFF = TTTParams(gate="off")
BIG = 1 << 30
# Rows are computed in batches of other shapes: the same to rounding.
LOGPROB, LOSS = 2e-3, 1e-3
# Adam turns the rounding of a gradient near 0 into a step of its own; of the way that the weights
# have come, this share.
WEIGHTS = 0.02


def make_core(directory: Path, *sessions: str, cached: int = BIG, **settings: Any) -> EngineCore:
    core = harness.make_core(directory, prefix_cache_bytes=cached, **settings)
    for name in sessions:
        core.sessions.create(name, TTTParams())
    return core


def ask(
    directory: Path, number: int, length: int, ttt: TTTParams = OFF, **sampling: Any
) -> GenerateRequest:
    params = replace(harness.GREEDY, **sampling)
    return GenerateRequest(harness.text(directory, number, length), params, ttt)


def counts(core: EngineCore) -> tuple[int, int, int, int]:
    """Tokens looked up and found, trunk and adaptive."""
    trunk, adaptive = core.stats().prefix_trunk, core.stats().prefix_adaptive
    return trunk.queries, trunk.hits, adaptive.queries, adaptive.hits


def rows_read(recorder: harness.Recorder) -> list[int]:
    """Rows of each prefill since the last call."""
    rows = [record.tokens for record in recorder.steps if record.kind == "prefill"]
    recorder.steps.clear()
    return rows


# --- the same with and without -------------------------------------------------------------------


def _draw_ttt(draw: random.Random, session: str | None) -> TTTParams:
    gate: Any = draw.choice(["off", "fixed", "fixed", "threshold", "random"])
    when: Any = draw.choice(["inline", "background"]) if session and gate != "off" else None
    adapt_on: Any = draw.choice(["prompt", "generated", "both"])
    return TTTParams(
        session=session, gate=gate, chunk_size=draw.choice([32, 50, 64, 100, 128]), when=when,
        adapt_on=adapt_on, budget=4.0, seed=draw.randrange(100),
    )  # fmt: skip


def _draw_request(directory: Path, draw: random.Random, session: str | None) -> Request:
    stem = harness.text(directory, draw.randrange(3), 300)
    cut = draw.choice([0, 40, 63, 64, 65, 100, 128, 192, 200, 256])
    prompt = stem[:cut] + harness.text(directory, draw.randrange(3, 6), draw.choice([1, 30, 64]))
    ttt = _draw_ttt(draw, session)
    if session is not None and draw.random() < 0.15:
        documents = (prompt, stem[: draw.randrange(64, 300)])
        return AdaptRequest(documents, replace(ttt, gate="fixed", adapt_on=None, when=None))
    several = ttt.gate == "off" or ttt.adapt_on == "prompt"
    sampling = SamplingParams(
        max_tokens=draw.choice([0, 1, 12, 80]),
        temperature=draw.choice([0.0, 1.0]),
        top_k=20,
        seed=draw.randrange(1000),
        n=draw.choice([1, 1, 3]) if several else 1,
        ignore_eos=True,
        logprobs=1,
        prompt_logprobs=draw.choice([None, None, 1]),
    )
    return GenerateRequest(prompt, sampling, ttt)


def _assert_same_logprobs(one: SampledToken | None, other: SampledToken | None) -> None:
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=LOGPROB)


def _scored(outcome: harness.Outcome) -> list[PromptEvent]:
    return [event for event in outcome.events if isinstance(event, PromptEvent)]


def assert_same(one: harness.Outcome, other: harness.Outcome) -> None:
    """Texts, log-probabilities and what was learned agree; times and cached tokens need not."""
    assert one.tokens == other.tokens
    assert one.texts == other.texts
    assert one.reasons == other.reasons
    for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
        for drawn, twin_drawn in zip(mine, theirs, strict=True):
            _assert_same_logprobs(drawn, twin_drawn)
    for scored, twin_scored in zip(_scored(one), _scored(other), strict=True):
        for token, twin_token in zip(scored.logprobs, twin_scored.logprobs, strict=True):
            _assert_same_logprobs(token, twin_token)
    for chunk, twin in zip(one.chunks, other.chunks, strict=True):
        for loss in ("loss_before", "loss_after"):
            assert getattr(chunk, loss) == pytest.approx(getattr(twin, loss), abs=LOSS)
        plain, twin_plain = (
            replace(each, loss_before=None, loss_after=None, seconds=0.0) for each in (chunk, twin)
        )
        assert plain == twin_plain
    done, twin_done = one.done, other.done
    assert done.prompt_tokens == twin_done.prompt_tokens
    assert done.generated_tokens == twin_done.generated_tokens
    assert (done.ttt is None) == (twin_done.ttt is None)
    if done.ttt is not None and twin_done.ttt is not None:
        for name in ("version_before", "version_after", "pending"):
            assert getattr(done.ttt, name) == getattr(twin_done.ttt, name)


def assert_same_sessions(one: EngineCore, other: EngineCore) -> None:
    assert one.sessions.names() == other.sessions.names()
    for name in one.sessions.names():
        mine, theirs = one.sessions.get(name), other.sessions.get(name)
        assert (mine.version, mine.chunks, list(mine.learned)) == (
            theirs.version, theirs.chunks, list(theirs.learned),
        )  # fmt: skip
        assert mine.loss_ema == pytest.approx(theirs.loss_ema, abs=LOSS)
        way = harness.weights(other, name) - other.bank.fresh_weights
        apart = harness.weights(one, name) - harness.weights(other, name)
        assert float(apart.norm()) <= WEIGHTS * float(way.norm()) + 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_random_requests_come_out_the_same_with_and_without_the_cache(
    tiny_llama_dir: Path, tiny_mistral_dir: Path, tiny_gpt2_dir: Path, seed: int
) -> None:
    draw = random.Random(seed)
    # Learned positions and a sliding window, too.
    directory = {4: tiny_gpt2_dir, 5: tiny_mistral_dir}.get(seed, tiny_llama_dir)
    # Room for some 20 blocks of the trunk, so that entries come and go; or for all.
    cached = BIG if seed % 2 else 700_000
    cores = [
        make_core(directory, "a", "b", cached=size, max_batch_tokens=256, busy_batch_tokens=128)
        for size in (cached, 0)
    ]
    for _ in range(14):
        if draw.random() < 0.1:
            for core in cores:
                core.delete_session("b")
                core.sessions.create("b", TTTParams())
        together = draw.sample(["a", "b", None], draw.randrange(1, 4))
        asked = [_draw_request(directory, draw, session) for session in together]
        outcomes = [harness.run(core, *asked) for core in cores]
        assert cores[0].prefixes.cache.nbytes <= cached
        for one, other in zip(*outcomes, strict=True):
            assert_same(one, other)
            assert other.done.cached_tokens == 0
        assert_same_sessions(*cores)
    trunk, adaptive = cores[0].stats().prefix_trunk, cores[0].stats().prefix_adaptive
    assert trunk.hits > 0
    assert adaptive.hits > 0 or cached < BIG
    assert (trunk.evictions > 0) == (cached < BIG)
    assert counts(cores[1]) == (0, 0, 0, 0)
    assert cores[1].stats().prefix_trunk == PrefixCounts()


class Noting:
    """Stands for a policy: notes the features and learns every other chunk."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def choose(self, decision: Decision) -> Action:
        self.seen.append(decision.features())
        return Action.UPDATE_1 if len(self.seen) % 2 else Action.SKIP


@pytest.mark.parametrize("when", ["inline", "background"])
def test_features_of_chunks_are_the_same_with_and_without_the_cache(
    tiny_llama_dir: Path, when: When
) -> None:
    ttt = TTTParams(
        session="s", gate="policy", chunk_size=96, when=when, adapt_on="both", budget=9.0
    )
    gates = Noting(), Noting()
    cores = [
        make_core(tiny_llama_dir, "s", cached=size, policy=gate)
        for size, gate in zip((BIG, 0), gates, strict=True)
    ]
    for length in (150, 256, 300):
        for core in cores:
            core.sessions.get("s").learned.clear()
        request = ask(tiny_llama_dir, 0, length, ttt, max_tokens=100)
        ((got,), (expected,)) = (harness.run(core, request) for core in cores)
        assert_same(got, expected)
    assert_same_sessions(*cores)
    assert cores[0].stats().prefix_trunk.hits > 300
    assert len(gates[0].seen) == len(gates[1].seen) > 8
    for features, twins in zip(gates[0].seen, gates[1].seen, strict=True):
        torch.testing.assert_close(features, twins, atol=2e-3, rtol=1e-3)


# --- what is read and what is not ----------------------------------------------------------------


def test_prompt_seen_before_is_read_from_its_last_token_on(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir)
    recorder = core.observer = harness.Recorder()
    (first,) = harness.run(core, ask(tiny_llama_dir, 0, 192, max_tokens=3))
    assert (rows_read(recorder), counts(core)) == ([192], (192, 0, 192, 0))
    (again,) = harness.run(core, ask(tiny_llama_dir, 0, 192, max_tokens=3))
    # All of it is known; the last position is run for its logits, above the trunk only.
    assert (rows_read(recorder), counts(core)) == ([1], (384, 192, 384, 191))
    (longer,) = harness.run(core, ask(tiny_llama_dir, 0, 210, max_tokens=3))
    assert (rows_read(recorder), counts(core)) == ([18], (594, 384, 594, 383))
    assert first.tokens == again.tokens
    assert [o.done.cached_tokens for o in (first, again, longer)] == [0, 192, 192]


def test_version_bump_costs_the_adaptive_part_and_not_the_trunks(tiny_llama_dir: Path) -> None:
    core, plain = (make_core(tiny_llama_dir, "s", "t", cached=size) for size in (BIG, 0))
    recorder = core.observer = harness.Recorder()
    quiet = TTTParams(session="s", gate="off", read="session")
    other = replace(quiet, session="t")
    prompt, lesson = ask(tiny_llama_dir, 0, 200, quiet), harness.text(tiny_llama_dir, 4, 64)
    teach = TTTParams(session="s", gate="fixed", chunk_size=64)
    trunk_runs: list[int] = []
    run = core.model.run

    def counted(x: torch.Tensor, first: int, *rest: Any) -> torch.Tensor:
        if first == 0:
            trunk_runs.append(len(x))
        return run(x, first, *rest)

    for ttt, learned, adaptive, trunk in (
        (quiet, False, 200, 200), (quiet, False, 8, 8), (quiet, True, 200, 8),
        # A session that has learned nothing is the base model, as the first one was.
        (quiet, False, 8, 8), (other, False, 8, 8), (quiet, False, 8, 8),
    ):  # fmt: skip
        for each in (core, plain):
            if learned:
                harness.adapt(each, lesson, ttt=teach)
        recorder.steps.clear()
        request = replace(prompt, ttt=ttt, sampling=replace(prompt.sampling, max_tokens=1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(core.model, "run", counted)
            (got,) = harness.run(core, replace(request, request_id=f"{len(trunk_runs)}"))
        (expected,) = harness.run(plain, request)
        assert_same(got, expected)
        assert sum(rows_read(recorder)) == adaptive
        assert sum(trunk_runs) == trunk
        trunk_runs.clear()


def test_prompt_shorter_than_a_block_leaves_nothing(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir)
    for _ in range(2):
        got = harness.generate(core, harness.text(tiny_llama_dir, 0, 50), ttt=OFF)
        assert got.done.cached_tokens == 0
    assert len(core.prefixes.cache) == 0
    assert counts(core) == (100, 0, 100, 0)


def test_generated_text_is_known_when_it_comes_back_as_a_prompt(tiny_llama_dir: Path) -> None:
    core, plain = make_core(tiny_llama_dir), make_core(tiny_llama_dir, cached=0)
    prompt = harness.text(tiny_llama_dir, 0, 100)
    (answer,) = harness.run(core, ask(tiny_llama_dir, 0, 100, max_tokens=100))[0].tokens
    follow = GenerateRequest((*prompt, *answer, 5, 6, 7), harness.GREEDY, OFF)
    ((got,), (expected,)) = (harness.run(each, follow) for each in (core, plain))
    assert_same(got, expected)
    # 199 positions were read: the last token drawn was not.
    assert got.done.cached_tokens == 192


def test_weights_of_one_request_share_the_base_models_entries_until_they_learn(
    tiny_llama_dir: Path,
) -> None:
    core, plain = make_core(tiny_llama_dir), make_core(tiny_llama_dir, cached=0)
    learning = TTTParams(gate="fixed", chunk_size=128)
    for each in (core, plain):
        harness.run(each, ask(tiny_llama_dir, 0, 256, learning))
    # The first chunk was read with fresh weights, the second was not.
    base = [core.prefixes.cache.adaptive(None, 0, key) is not None
            for key in chain_keys(harness.text(tiny_llama_dir, 0, 256))]  # fmt: skip
    assert base == [True, True, False, False]
    for ttt in (OFF, learning, replace(learning, chunk_size=256)):
        request = ask(tiny_llama_dir, 0, 256, ttt, prompt_logprobs=1)
        ((got,), (expected,)) = (harness.run(each, request) for each in (core, plain))
        assert_same(got, expected)
    assert core.stats().prefix_adaptive.hits == 128 + 127 + 255
    assert set(core.prefixes.cache._owned) == {None}


def test_entries_without_final_activations_do_not_serve_who_needs_them(
    tiny_llama_dir: Path,
) -> None:
    core, plain = make_core(tiny_llama_dir), make_core(tiny_llama_dir, cached=0)
    hits = []
    for scored in (None, 1, 1):
        request = ask(tiny_llama_dir, 0, 128, prompt_logprobs=scored)
        ((got,), (expected,)) = (harness.run(each, request) for each in (core, plain))
        assert_same(got, expected)
        hits.append(core.stats().prefix_adaptive.hits)
    assert hits == [0, 0, 127]


def test_sequences_side_by_side_of_which_one_is_known_take_turns(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, max_batch_tokens=64, busy_batch_tokens=64)
    harness.run(core, ask(tiny_llama_dir, 0, 256, TTTParams(gate="fixed", chunk_size=16)))
    new = harness.submit(core, ask(tiny_llama_dir, 1, 400))
    core.step()
    seen = harness.submit(core, ask(tiny_llama_dir, 0, 256))
    recorder = core.observer = harness.Recorder()
    harness.step_until(core, lambda: bool(recorder.first_tokens))
    progress = [(s.known, s.generated) for g in core._lifecycle.running for s in g.sequences]
    assert progress == [(0, 0), (256, 1)]
    harness.drain(core)
    assert (new.done.cached_tokens, seen.done.cached_tokens) == (0, 256)


# --- ends of all kinds ---------------------------------------------------------------------------


def test_session_that_was_deleted_leaves_the_trunks_entries_only(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s")
    ttt = TTTParams(session="s", gate="off", read="session")
    teach = TTTParams(session="s", gate="fixed", chunk_size=64)
    harness.adapt(core, harness.text(tiny_llama_dir, 4, 64), ttt=teach)
    core.prefixes.cache.clear()
    harness.run(core, ask(tiny_llama_dir, 0, 128, ttt))
    assert core.stats().prefix_adaptive.nbytes > 0
    core.delete_session("s")
    assert core.stats().prefix_adaptive.nbytes == 0
    core.sessions.create("s", TTTParams())
    (got,) = harness.run(core, ask(tiny_llama_dir, 0, 128, ttt))
    assert (got.done.cached_tokens, core.stats().prefix_adaptive.hits) == (128, 0)


def test_fork_of_a_session_does_not_read_its_parents_entries(tiny_llama_dir: Path) -> None:
    core, plain = (make_core(tiny_llama_dir, "s", cached=size) for size in (BIG, 0))
    quiet = TTTParams(session="s", gate="off")
    teach = TTTParams(session="s", gate="fixed", chunk_size=64)
    for each in (core, plain):
        harness.adapt(each, harness.text(tiny_llama_dir, 4, 64), ttt=teach)
        harness.run(each, ask(tiny_llama_dir, 0, 128, quiet))
        each.sessions.fork("s", "t")
        for name in ("s", "t"):
            harness.adapt(
                each, harness.text(tiny_llama_dir, 5 if name == "s" else 6, 64),
                ttt=replace(teach, session=name),
            )  # fmt: skip
    for name in ("s", "t", "s"):
        request = ask(tiny_llama_dir, 0, 128, TTTParams(session=name, gate="off"))
        ((got,), (expected,)) = (harness.run(each, request) for each in (core, plain))
        assert_same(got, expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_request_aborted_in_the_middle_leaves_what_it_has_read(
    tiny_llama_dir: Path, steps: int
) -> None:
    core, plain = (make_core(tiny_llama_dir, cached=size, max_batch_tokens=100,
                             busy_batch_tokens=100) for size in (BIG, 0))  # fmt: skip
    request = ask(tiny_llama_dir, 0, 250)
    harness.submit(core, request)
    for _ in range(steps):
        core.step()
    core.abort(request.request_id)
    assert harness.holdings(core)[:2] == (0, 0)
    again = ask(tiny_llama_dir, 0, 250)
    ((got,), (expected,)) = (harness.run(each, again) for each in (core, plain))
    assert got.done.cached_tokens == min(steps * 100, 250) // 64 * 64
    assert_same(got, expected)


def test_eviction_between_two_pieces_of_a_prompt_does_no_harm(tiny_llama_dir: Path) -> None:
    core, plain = (make_core(tiny_llama_dir, cached=size, max_batch_tokens=64,
                             busy_batch_tokens=64) for size in (BIG, 0))  # fmt: skip
    for ttt in (OFF, TTTParams(gate="fixed", chunk_size=64)):
        harness.run(core, ask(tiny_llama_dir, 0, 256, ttt))
        for clear_after in (1, 2, 3):
            request = ask(tiny_llama_dir, 0, 256, ttt)
            got = harness.submit(core, request)
            for _ in range(clear_after):
                core.step()
            core.prefixes.cache.clear()
            harness.drain(core)
            assert got.done.cached_tokens == 256
            assert_same(got, *harness.run(plain, replace(request, request_id="again")))


def test_request_that_fails_leaves_no_entries(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s")
    slot_filler = TTTParams(session="s", gate="fixed", chunk_size=32)
    harness.adapt(core, harness.text(tiny_llama_dir, 3, 32), ttt=slot_filler)
    session = core.sessions.get("s")
    core.prefixes.cache.clear()
    core.bank._weights[session.slot].fill_(float("nan"))
    quiet = TTTParams(session="s", gate="off", read="session")
    (got,) = harness.run(core, ask(tiny_llama_dir, 0, 128, quiet))
    assert got.error
    assert len(core.prefixes.cache) == 0
    (other,) = harness.run(core, ask(tiny_llama_dir, 0, 128))
    assert_same(
        other, *harness.run(make_core(tiny_llama_dir, cached=0), ask(tiny_llama_dir, 0, 128))
    )


def test_prefix_that_can_not_be_kept_is_logged_and_the_request_goes_on(
    tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(tiny_llama_dir)

    def no_memory(*_: Any) -> bool:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(core.prefixes.cache, "put_adaptive", no_memory)
    with caplog.at_level(logging.ERROR):
        (got,) = harness.run(core, ask(tiny_llama_dir, 0, 128))
    assert got.done.generated_tokens == 12
    assert "not kept" in caplog.text
    assert len(core.prefixes.cache) == 0


def test_prefix_that_can_not_be_taken_over_fails_its_request_alone(
    tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(tiny_llama_dir)
    find = core.prefixes.cache.trunk
    (bad,) = chain_keys(harness.text(tiny_llama_dir, 0, 64))

    def broken(key: bytes) -> TrunkBlock | None:
        if key == bad:
            raise RuntimeError("damaged")
        return find(key)

    monkeypatch.setattr(core.prefixes.cache, "trunk", broken)
    with caplog.at_level(logging.ERROR):
        got, other = harness.run(core, ask(tiny_llama_dir, 0, 100), ask(tiny_llama_dir, 1, 100))
    assert str(got.error) == "damaged"
    assert other.done.generated_tokens == 12
    assert harness.holdings(core)[:2] == (0, 0)


def bump(core: EngineCore, name: str) -> AdapterState:
    """Another version of a session's weights, as if somebody had taught it."""
    session = core.sessions.get(name)
    staged = core.bank.state(session.slot, session.owner)
    staged.weights += 0.3
    tag = replace(core.bank.tag(session.slot, session.owner), mode="WRITE")
    session.version = core.bank.commit(tag, staged)
    return staged


def test_version_moved_by_another_request_in_the_middle_is_not_entered_as_one(
    tiny_llama_dir: Path,
) -> None:
    core = make_core(tiny_llama_dir, "s", max_batch_tokens=64, busy_batch_tokens=64)
    quiet = TTTParams(session="s", gate="off")
    reading = harness.submit(core, ask(tiny_llama_dir, 0, 256, quiet))
    core.step()
    staged = bump(core, "s")
    harness.drain(core)
    assert reading.done.generated_tokens == 12
    chain = chain_keys(harness.text(tiny_llama_dir, 0, 256))
    assert all(core.prefixes.cache.trunk(key) is not None for key in chain)
    session, cache = core.sessions.get("s"), core.prefixes.cache
    assert not any(cache.adaptive(session, version, key) for version in (0, 1) for key in chain)
    # What was read before the first commit is the base model's.
    assert [cache.adaptive(None, 0, key) is not None for key in chain] == [True, *[False] * 3]
    # And who comes next reads all of it at the version of now.
    (got,) = harness.run(core, ask(tiny_llama_dir, 0, 256, quiet))
    fresh = make_core(tiny_llama_dir, "s", cached=0)
    twin = fresh.sessions.get("s")
    twin.state, twin.version = staged, 1
    (expected,) = harness.run(fresh, ask(tiny_llama_dir, 0, 256, quiet))
    assert_same(got, expected)


def test_request_begun_at_another_version_takes_nothing_of_the_present_one(
    tiny_llama_dir: Path,
) -> None:
    core = make_core(tiny_llama_dir, "s", max_batch_tokens=64, busy_batch_tokens=64)
    quiet = TTTParams(session="s", gate="off")
    harness.run(core, ask(tiny_llama_dir, 0, 256))
    harness.submit(core, ask(tiny_llama_dir, 0, 256, quiet))
    core.step()
    bump(core, "s")
    # While it waits, another request reads all of the prompt at the new version.
    (waiting,) = core._lifecycle.running
    core._lifecycle.running.clear()
    harness.run(core, ask(tiny_llama_dir, 0, 256, quiet))
    core._lifecycle.running.append(waiting)
    recorder = core.observer = harness.Recorder()
    harness.drain(core)
    assert sum(rows_read(recorder)) == 192


def test_version_and_digest_are_those_of_the_entries_taken_over(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s")
    quiet = TTTParams(session="s", gate="off")
    harness.run(core, ask(tiny_llama_dir, 0, 256, quiet))
    got = harness.submit(core, ask(tiny_llama_dir, 0, 256, quiet))
    core._lifecycle.admit()
    core._planner.next()
    # Between the plan and the phase nothing can happen; before another plan a write may.
    (group,) = core._lifecycle.running
    assert group.sequences[0].computed == 255
    digest = core.sessions.digest(core.sessions.get("s"))
    bump(core, "s")
    harness.drain(core)
    assert (got.report.version_before, got.report.version_after) == (0, 1)
    assert got.report.digest == digest


def test_cache_that_is_off_keeps_and_counts_nothing(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, cached=0)
    for _ in range(2):
        (got,) = harness.run(core, ask(tiny_llama_dir, 0, 128))
        assert got.done.cached_tokens == 0
    assert core.stats().prefix_trunk == core.stats().prefix_adaptive == PrefixCounts()
    group = core.prepare(ask(tiny_llama_dir, 0, 128), print)
    core.enqueue(group)
    core._lifecycle.admit()
    # Nor is a buffer set aside that nobody would read.
    assert group.sequences[0].boundary is None
