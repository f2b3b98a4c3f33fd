"""No session's learning reaches another, the base model, or the shared weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.core import EngineCore
from ponderttt.engine.observer import StepRecord
from ponderttt.engine.request import AdaptRequest, GenerateRequest, Request
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.fast_weights.bank import BASE_SLOT, OwnershipError, StepTag
from ponderttt.models.decoder import Decoder
from tests.ponderttt import reference
from tests.ponderttt.engine import harness

NAMES = ("a", "b", "c")
SCORE = SamplingParams(max_tokens=0, prompt_logprobs=0)


def make_core(directory: Path, *names: str) -> EngineCore:
    core = harness.make_core(directory)
    for name in names:
        core.sessions.create(name, TTTParams())
    return core


def teach(core: EngineCore, directory: Path, name: str, number: int) -> None:
    ttt = TTTParams(session=name, action=Action.UPDATE_2, chunk_size=32)
    harness.adapt(core, harness.text(directory, number, 160), ttt=ttt)


def scores(core: EngineCore, prompt: tuple[int, ...], session: str | None) -> Tensor:
    """Log-probabilities that a session gives to a prompt's tokens."""
    got = harness.generate(core, prompt, SCORE, TTTParams(session=session, gate="off"))
    return torch.tensor([t.logprob for t in got.prompt.logprobs if t is not None])


def checksum(decoder: Decoder) -> list[float]:
    """Of every shared weight: any change of any number shows."""
    tensors = [decoder.embedding, decoder.head.weight]
    for block in decoder.blocks:
        for linear in block.linears():
            tensors.append(linear.matrix.weight)
            if linear.bias is not None:
                tensors.append(linear.bias)
    return [float(t.view(torch.int32).sum(dtype=torch.int64)) for t in tensors]


def test_session_that_learns_changes_no_other_bit_by_bit(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, *NAMES)
    shared = checksum(core.model)
    teach(core, tiny_llama_dir, "b", 0)
    before = {name: core.sessions.state(core.sessions.get(name)) for name in "bc"}
    digests = {name: core.sessions.digest(core.sessions.get(name)) for name in "bc"}
    prompt = harness.text(tiny_llama_dir, 9, 60)
    everybody: tuple[str | None, ...] = (*NAMES, None)
    said = {name: scores(core, prompt, name) for name in everybody}
    teach(core, tiny_llama_dir, "a", 1)
    for name, state in before.items():
        now = core.sessions.state(core.sessions.get(name))
        assert torch.equal(now.weights, state.weights)
        assert torch.equal(now.first, state.first)
        assert torch.equal(now.second, state.second)
        assert core.sessions.digest(core.sessions.get(name)) == digests[name]
        assert torch.equal(scores(core, prompt, name), said[name])
    assert torch.equal(scores(core, prompt, None), said[None])
    assert not torch.allclose(scores(core, prompt, "a"), said["a"], atol=1e-2)
    assert checksum(core.model) == shared


def test_session_that_learned_nothing_and_the_base_give_the_models_own_logits(
    tiny_llama_dir: Path,
) -> None:
    core = make_core(tiny_llama_dir, *NAMES)
    teach(core, tiny_llama_dir, "a", 1)
    prompt = harness.text(tiny_llama_dir, 9, 60)
    with reference.hf_model(tiny_llama_dir) as model:
        logprobs = reference.hf_logits(model, prompt).log_softmax(dim=-1)
    expected = logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None]).squeeze(1)
    for session in (None, "b"):
        torch.testing.assert_close(scores(core, prompt, session), expected, atol=1e-4, rtol=1e-4)


def test_sessions_side_by_side_score_as_they_do_alone(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, *NAMES)
    for number, name in enumerate(NAMES):
        teach(core, tiny_llama_dir, name, number)
    prompt = harness.text(tiny_llama_dir, 9, 60)
    everybody: tuple[str | None, ...] = (*NAMES, None)
    alone = {name: scores(core, prompt, name) for name in everybody}
    requests = [
        GenerateRequest(prompt, SCORE, TTTParams(session=name, gate="off")) for name in alone
    ]
    for mine, got in zip(alone, harness.run(core, *requests), strict=True):
        together = torch.tensor([t.logprob for t in got.prompt.logprobs if t is not None])
        torch.testing.assert_close(together, alone[mine], atol=1e-4, rtol=1e-4)
        for other in alone:
            if other != mine:
                assert not torch.allclose(together, alone[other], atol=1e-2)


def test_weights_for_one_request_end_with_it(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir)
    prompt = harness.text(tiny_llama_dir, 0, 128)
    before = scores(core, prompt, None)
    learning = TTTParams(action=Action.UPDATE_4, chunk_size=32)
    first = harness.generate(core, prompt, harness.GREEDY, learning)
    assert first.report.version_after == 4
    assert torch.equal(scores(core, prompt, None), before)
    second = harness.generate(core, prompt, harness.GREEDY, learning)
    assert second.tokens == first.tokens
    assert second.report.digest == first.report.digest
    assert second.report.version_before == 0


def test_steps_of_any_run_are_tagged_with_owner_and_version_and_never_mix(
    tiny_llama_dir: Path,
) -> None:
    core = make_core(tiny_llama_dir, *NAMES)
    recorder = core.observer = harness.Recorder()
    requests: list[Request] = [
        AdaptRequest(
            (harness.text(tiny_llama_dir, n, 96),),
            TTTParams(session=name, gate="fixed", chunk_size=32),
        )
        for n, name in enumerate(NAMES)
    ]
    for number in range(4, 8):
        prompt = harness.text(tiny_llama_dir, number, 20 + 9 * number)
        ttt = TTTParams(
            session=(None, "a", "b", None)[number - 4],
            gate="off" if number == 4 else "fixed",
            adapt_on="prompt",
            chunk_size=32,
        )
        requests.append(GenerateRequest(prompt, harness.GREEDY, ttt))
    harness.run(core, *requests)
    assert {record.kind for record in recorder.steps} == {"prefill", "decode", "write"}
    reached = _check_tags(recorder.steps)
    for name in NAMES:
        assert reached[name] == core.sessions.get(name).version > 0
    assert sum(session.rollbacks for session in map(core.sessions.get, NAMES)) == 0
    assert any(len({tag.owner for tag in record.tags}) > 2 for record in recorder.steps)


def _check_tags(steps: list[StepRecord]) -> dict[str, int]:
    """Replay the tags of updates of one step; returns each owner's last version."""
    versions: dict[str, int] = {}
    slots: dict[str, int] = {}
    for record in steps:
        assert {tag.mode for tag in record.tags} == {"WRITE" if record.kind == "write" else "READ"}
        for tag in record.tags:
            if tag.owner is None:
                assert (tag.slot, tag.version, tag.mode) == (BASE_SLOT, 0, "READ")
                continue
            assert tag.slot != BASE_SLOT
            assert slots.setdefault(tag.owner, tag.slot) == tag.slot
            # Also fails where one step reads two versions, or writes one session twice.
            assert tag.version == versions.get(tag.owner, 0)
            if tag.mode == "WRITE":
                versions[tag.owner] = tag.version + 1
    return versions


@pytest.mark.parametrize(
    "change",
    [
        lambda tag: StepTag(tag.slot, "b", tag.version),
        lambda tag: StepTag(tag.slot, None, tag.version),
        lambda tag: StepTag(tag.slot, tag.owner, tag.version - 1),
        lambda tag: StepTag(tag.slot, tag.owner, tag.version + 1),
        lambda tag: StepTag(tag.slot + 1, tag.owner, tag.version),
        lambda tag: StepTag(BASE_SLOT, tag.owner, tag.version),
    ],
)
def test_read_with_a_foreign_or_outdated_tag_raises_and_reads_nothing(
    tiny_llama_dir: Path, change: Any
) -> None:
    core = make_core(tiny_llama_dir, "a", "b")
    teach(core, tiny_llama_dir, "a", 0)
    group = core.prepare(
        GenerateRequest((5, 6, 7), harness.GREEDY, TTTParams(session="a", gate="off")), print
    )
    core.enqueue(group)
    core._lifecycle.admit()
    sequence = group.sequences[0]
    (tag,) = core.reader.tags([sequence])
    assert (tag.owner, tag.version, tag.mode) == ("a", 5, "READ")
    with pytest.raises(OwnershipError):
        core.reader.read([(sequence, 3)], [change(tag)])
    assert sequence.computed == 0
    core.reader.read([(sequence, 3)], [tag])
    assert sequence.computed == 3


def test_tags_taken_before_a_commit_are_outdated_after_it(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, "a")
    assert core.sessions.acquire(core.sessions.get("a"))
    session = core.sessions.get("a")
    old = core.bank.tag(session.slot, "a")
    teach(core, tiny_llama_dir, "a", 0)
    with pytest.raises(OwnershipError, match="version"):
        core.bank.read([old], [1])


def test_report_of_a_session_never_names_another(tiny_llama_dir: Path) -> None:
    core = make_core(tiny_llama_dir, *NAMES)
    requests = [
        GenerateRequest(
            harness.text(tiny_llama_dir, n, 64),
            harness.GREEDY,
            TTTParams(session=name, gate="fixed", chunk_size=32),
        )
        for n, name in enumerate(NAMES)
    ]
    for name, got in zip(NAMES, harness.run(core, *requests), strict=True):
        assert got.report.session == name
        assert (got.report.version_before, got.report.version_after) == (0, 2)
