"""The engine as a whole: what goes wrong, its sessions, its phases, and who observes them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.core import EngineCore
from ponderttt.engine.observer import StepRecord
from ponderttt.engine.outputs import ErrorEvent
from ponderttt.engine.reader import Reader
from ponderttt.engine.request import AdaptRequest, GenerateRequest
from ponderttt.engine.sampler import NonFiniteLogitsError
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.errors import ConflictError, ModelError, NotFoundError
from tests.ponderttt.engine import harness
from tests.ponderttt.engine.asking import LONG, OFF, ask, learn, make_core

# --- trouble --------------------------------------------------------------------------------------


@contextmanager
def poisoned(core: EngineCore, victim: str, when: str) -> Iterator[None]:
    """Make the hidden states of one request NaN in a phase, as overflow would."""
    read = Reader.read

    def poison(self: Reader, pieces: Any, tags: Any, *, decodes: bool = False) -> Any:
        normed = read(self, pieces, tags, decodes=decodes)
        kind = "decode" if decodes else "prefill"
        out = []
        for (sequence, _), rows in zip(pieces, normed, strict=True):
            hit = sequence.group.id == victim and kind == when
            if hit and sequence.final is not None:
                sequence.final.fill_(torch.nan)
            out.append(rows * torch.nan if hit else rows)
        return tuple(out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "read", poison)
        yield


@pytest.mark.parametrize("when", ["prefill", "decode"])
@pytest.mark.parametrize("ttt", [OFF, learn(None)])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_request_whose_logits_are_not_finite_fails_alone(
    tiny_gpt2_dir: Path, when: str, ttt: TTTParams, victim: int
) -> None:
    requests = [ask(tiny_gpt2_dir, n, 20 + 7 * n, ttt) for n in range(3)]
    alone = [harness.run(make_core(tiny_gpt2_dir), request)[0] for request in requests]
    core = make_core(tiny_gpt2_dir)
    recorder = core.observer = harness.Recorder()
    with poisoned(core, requests[victim].request_id, when):
        outcomes = harness.run(core, *requests)
    for number, (outcome, lone) in enumerate(zip(outcomes, alone, strict=True)):
        if number == victim:
            assert isinstance(outcome.error, NonFiniteLogitsError | ModelError)
        else:
            assert outcome.tokens == lone.tokens
            assert outcome.done.generated_tokens == 40
    assert harness.holdings(core) == (0, 0, {})
    assert sorted(outcome for outcome, _, _ in recorder.outcomes) == ["error", "length", "length"]


def test_siblings_of_a_request_whose_logits_are_not_finite_end_with_one_error(
    tiny_llama_dir: Path,
) -> None:
    core = make_core(tiny_llama_dir)
    request = GenerateRequest(
        harness.text(tiny_llama_dir, 0, 20), SamplingParams(max_tokens=9, n=3), OFF
    )
    with poisoned(core, request.request_id, "decode"):
        (got,) = harness.run(core, request)
    assert sum(isinstance(event, ErrorEvent) for event in got.events) == 1
    assert isinstance(got.events[-1], ErrorEvent)


def test_document_whose_losses_are_not_finite_fails_and_the_session_stays_sound(
    tiny_llama_dir: Path,
) -> None:
    core = make_core(tiny_llama_dir, "s")
    ttt = TTTParams(session="s", gate="threshold", chunk_size=32)
    harness.adapt(core, harness.text(tiny_llama_dir, 0, 64), ttt=ttt)
    session = core.sessions.get("s")
    before = (session.loss_ema, session.threshold.mean, session.chunks, session.version)
    request = AdaptRequest((harness.text(tiny_llama_dir, 1, 64),), ttt)
    with poisoned(core, request.request_id, "prefill"):
        (got,) = harness.run(core, request)
    assert isinstance(got.error, ModelError)
    assert "tokens 0 to 32" in str(got.error)
    after = (session.loss_ema, session.threshold.mean, session.chunks, session.version)
    assert after == before
    assert session.pins == 0


@pytest.mark.parametrize("kind", ["prefill", "decode", "write"])
def test_phase_that_raises_fails_its_requests_alone(
    tiny_llama_dir: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    core = make_core(tiny_llama_dir, "s", max_num_seqs=2)
    ttt = OFF if kind == "decode" else learn("s")
    victims = [harness.submit(core, ask(tiny_llama_dir, n, 40, ttt)) for n in range(2)]
    survivor = harness.submit(core, ask(tiny_llama_dir, 2, 40))
    broken = True
    run = core._phases.run

    def fail_once(plan: Any) -> Any:
        nonlocal broken
        name = type(plan).__name__.removesuffix("Plan").lower()
        result = run(plan)
        if name == kind and broken:
            broken = False
            raise RuntimeError("the phase broke")
        return result

    monkeypatch.setattr(core._phases, "run", fail_once)
    with caplog.at_level(logging.CRITICAL, "ponderttt"):
        harness.drain(core)
    assert not broken
    failed = [victim for victim in victims if isinstance(victim.events[-1], ErrorEvent)]
    # A session takes one write at a time.
    assert len(failed) == (1 if kind == "write" else 2)
    assert all(str(victim.error) == "the phase broke" for victim in failed)
    assert survivor.done.generated_tokens == 40
    assert harness.holdings(core)[1:] == (0, {"s": 0})


# --- sessions -------------------------------------------------------------------------------------


def test_session_evicted_and_brought_back_has_the_same_weights_bit_by_bit(
    tiny_llama_dir: Path,
) -> None:
    core = make_core(tiny_llama_dir, "s", "t", adapter_slots=1)
    harness.adapt(core, harness.text(tiny_llama_dir, 0, 64), ttt=learn("s"))
    state = core.sessions.state(core.sessions.get("s"))
    prompt = harness.text(tiny_llama_dir, 1, 40)
    before = harness.generate(core, prompt, LONG, learn("s", gate="off"))
    harness.adapt(core, harness.text(tiny_llama_dir, 2, 64), ttt=learn("t"))
    assert core.stats().evictions == 1
    after = harness.generate(core, prompt, LONG, learn("s", gate="off"))
    assert core.stats().evictions == 2
    again = core.sessions.state(core.sessions.get("s"))
    for one, two in ((state.weights, again.weights), (state.first, again.first),
                     (state.second, again.second)):  # fmt: skip
        assert torch.equal(one, two)
    assert state.step == again.step
    assert (after.tokens, after.report.digest) == (before.tokens, before.report.digest)


def test_fork_learns_apart_from_its_parent(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s")
    harness.adapt(core, harness.text(tiny_llama_dir, 0, 64), ttt=learn("s"))
    core.sessions.fork("s", "t")
    taught = harness.weights(core, "s")
    seen = harness.adapt(core, harness.text(tiny_llama_dir, 0, 64), ttt=learn("t"))
    assert {r.reason for r in seen.chunks} == {"seen"}
    harness.adapt(core, harness.text(tiny_llama_dir, 1, 64), ttt=learn("t"))
    assert torch.equal(harness.weights(core, "s"), taught)
    # Either goes on as the other would with the same lesson.
    harness.adapt(core, harness.text(tiny_llama_dir, 1, 64), ttt=learn("s"))
    torch.testing.assert_close(harness.weights(core, "s"), harness.weights(core, "t"))
    assert core.sessions.get("s").version == core.sessions.get("t").version == 4


def test_delete_of_a_session_in_use_is_a_conflict(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s")
    got = harness.submit(core, ask(tiny_llama_dir, 0, 40, learn("s")))
    core.step()
    with pytest.raises(ConflictError, match="in use"):
        core.delete_session("s")
    harness.drain(core)
    assert got.ended
    core.delete_session("s")
    assert harness.holdings(core) == (0, 0, {})
    with pytest.raises(NotFoundError):
        core.delete_session("s")


def test_export_of_a_session_holds_its_weights(tiny_llama_dir: Path, tmp_path: Path) -> None:
    core = make_core(tiny_llama_dir, "s")
    harness.adapt(core, harness.text(tiny_llama_dir, 0, 64), ttt=learn("s"))
    core.export_adapter("s", tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == core.bank.layout.size
    views = core.bank.layout.views(harness.weights(core, "s")[None])
    for (layer, module), (a, b) in views.items():
        (name,) = [n for n in tensors if f".{layer}.{module}.lora_A" in n]
        assert torch.equal(tensors[name], a[0])
        assert torch.equal(tensors[name.replace("lora_A", "lora_B")], b[0])
    with pytest.raises(NotFoundError):
        core.export_adapter("unknown", tmp_path)


# --- phases and observers -------------------------------------------------------------------------


def _started(core: EngineCore) -> bool:
    return any(s.generated > 3 for g in core._lifecycle.running for s in g.sequences)


def test_phases_while_others_decode_stay_small(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s", max_batch_tokens=128, busy_batch_tokens=16)
    records: list[StepRecord] = []
    busy: list[bool] = []
    recorder = core.observer = harness.Recorder()
    decoder = harness.submit(core, GenerateRequest((5, 6, 7), replace(LONG, max_tokens=200), OFF))
    harness.step_until(core, lambda: _started(core))
    document = harness.submit(
        core, AdaptRequest((harness.text(tiny_llama_dir, 0, 256),), learn("s"))
    )
    while not (decoder.ended or document.ended):
        seen = len(recorder.steps)
        core.step()
        records += recorder.steps[seen:]
        busy += [not decoder.ended] * (len(recorder.steps) - seen)
    kinds = {record.kind for record in records}
    assert kinds == {"prefill", "decode", "write"}
    for record, others_decode in zip(records, busy, strict=True):
        if others_decode:
            assert record.tokens <= (32 if record.kind == "write" else 16)
    # The decoder got its share: no two other phases in a row while it decoded.
    for one, two, others_decode in zip(records, records[1:], busy[1:], strict=False):
        assert not (others_decode and one.kind != "decode" != two.kind)
    harness.drain(core)


def test_requests_behind_a_long_document_do_not_wait_for_its_end(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s", max_batch_tokens=64, busy_batch_tokens=64)
    texts = tuple(harness.text(tiny_llama_dir, n, 64) for n in range(24))
    # All chunks are skipped, so nothing but fairness lets anybody else read.
    document = harness.submit(core, AdaptRequest(texts, learn("s", gate="off", chunk_size=64)))
    harness.submit(core, GenerateRequest((5, 6, 7), replace(LONG, max_tokens=400), OFF))
    harness.step_until(core, lambda: len(document.chunks) >= 2)
    asked = [
        harness.submit(core, ask(tiny_llama_dir, 50, 64)),
        harness.submit(core, ask(tiny_llama_dir, 51, 64, learn("s"))),
    ]
    harness.step_until(core, lambda: all(outcome.tokens for outcome in asked))
    assert len(document.chunks) <= 8
    harness.drain(core)
    assert len(document.chunks) == 24


def test_update_behind_a_long_document_of_the_same_session_gets_its_turn(
    tiny_llama_dir: Path,
) -> None:
    core = make_core(tiny_llama_dir, "s")
    texts = (harness.text(tiny_llama_dir, 0, 384), harness.text(tiny_llama_dir, 1, 384))
    document = harness.submit(core, AdaptRequest(texts, learn("s", chunk_size=16)))
    harness.step_until(core, lambda: len(document.chunks) >= 2)
    asked = harness.submit(core, ask(tiny_llama_dir, 50, 64, learn("s")))
    harness.step_until(core, lambda: len(asked.chunks) == 2)
    assert len(document.chunks) <= 12
    harness.drain(core)


def test_document_beyond_the_context_is_learned_window_by_window(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s", max_model_len=100)
    texts = (harness.text(tiny_llama_dir, 0, 250), harness.text(tiny_llama_dir, 1, 40))
    got = harness.adapt(core, *texts, ttt=learn("s", chunk_size=64))
    assert [(r.document, r.start, r.end) for r in got.chunks] == [
        (0, 0, 64), (0, 64, 100), (0, 0, 64), (0, 64, 100), (0, 0, 50), (1, 0, 40),
    ]  # fmt: skip
    assert [r.index for r in got.chunks] == list(range(6))
    assert {r.reason for r in got.chunks} == {"fixed"}
    assert got.done.prompt_tokens == 290
    alone = make_core(tiny_llama_dir, "s", max_model_len=100)
    windows = (texts[0][:100], texts[0][100:200], texts[0][200:], texts[1])
    for window in windows:
        harness.adapt(alone, window, ttt=learn("s", chunk_size=64))
    torch.testing.assert_close(harness.weights(core, "s"), harness.weights(alone, "s"))


def test_observer_hears_of_steps_tokens_chunks_and_ends(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "s")
    recorder = core.observer = harness.Recorder()
    assert core.observer is recorder
    got = harness.run(core, ask(tiny_llama_dir, 0, 64, learn("s")))[0]
    assert recorder.chunks == got.chunks
    assert recorder.outcomes == [("length", 64, 40)]
    assert (len(recorder.first_tokens), len(recorder.next_tokens)) == (1, 39)
    assert all(seconds >= 0 for seconds in recorder.first_tokens + recorder.next_tokens)
    assert sum(r.tokens for r in recorder.steps if r.kind == "prefill") == 64
    assert sum(r.tokens for r in recorder.steps if r.kind == "decode") == 39
    assert [r.tokens for r in recorder.steps if r.kind == "write"] == [31, 32]
    assert all(record.seconds > 0 for record in recorder.steps)


def test_stats_of_an_idle_engine_are_zero_but_for_its_sizes(tiny_llama_dir: Path) -> None:
    stats = make_core(tiny_llama_dir, "s", adapter_slots=3, max_kv_tokens=4000).stats()
    assert (stats.bank_capacity, stats.kv_capacity, stats.sessions) == (3, 4000, 1)
    assert (stats.running, stats.waiting, stats.background) == (0, 0, 0)
    assert (stats.kv_tokens, stats.bank_occupied, stats.evictions) == (0, 0, 0)


def test_step_of_an_idle_engine_does_nothing(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir)
    assert not core.step()
    assert not core.has_work
    assert not core.has_requests


@pytest.mark.parametrize(("length", "kv", "limit"), [(None, 65536, 512), (9999, 65536, 512),
                                                     (None, 128, 128), (64, 128, 64)])  # fmt: skip
def test_context_window_is_no_longer_than_model_and_cache_allow(
    tiny_llama_dir: Path, length: int | None, kv: int, limit: int
) -> None:
    core = make_core(tiny_llama_dir, max_model_len=length, max_kv_tokens=kv)
    assert core.max_model_len == limit
