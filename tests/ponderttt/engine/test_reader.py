"""Reads of pieces of sequences: what they keep, and that it does not depend on the pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.core import EngineCore
from ponderttt.engine.request import GenerateRequest
from ponderttt.engine.sequence import Sequence
from tests.ponderttt import reference
from tests.ponderttt.engine import harness

LENGTH = 40


@pytest.fixture
def core(tiny_llama_dir: Path) -> EngineCore:
    core = harness.make_core(tiny_llama_dir)
    core.sessions.create("s", TTTParams())
    ttt = TTTParams(session="s", action=Action.UPDATE_2, chunk_size=32)
    harness.adapt(core, harness.text(tiny_llama_dir, 9, 128), ttt=ttt)
    return core


def start(core: EngineCore, ids: tuple[int, ...], session: str | None = None) -> Sequence:
    """A sequence that keeps what chunks need, ready to be read."""
    gate = "off" if session is None else "fixed"
    group = core.prepare(
        GenerateRequest(ids, ttt=TTTParams(session=session, gate=gate)),  # type: ignore[arg-type]
        print,
    )
    core.enqueue(group)
    core._lifecycle.admit()
    sequence = group.sequences[0]
    if sequence.final is None:
        sequence.boundary, sequence.final = core.reader.new_buffers(sequence.cache.capacity)
    return sequence


def read(core: EngineCore, pieces: list[tuple[Sequence, int]]) -> tuple[Tensor, ...]:
    reader = core.reader
    return reader.read(pieces, reader.tags([sequence for sequence, _ in pieces]))


def test_read_of_the_base_keeps_final_states_whose_logits_are_the_models(
    core: EngineCore, tiny_llama_dir: Path
) -> None:
    ids = harness.text(tiny_llama_dir, 0, LENGTH)
    sequence = start(core, ids)
    (normed,) = read(core, [(sequence, LENGTH)])
    assert (sequence.computed, sequence.cache.length) == (LENGTH, LENGTH)
    assert sequence.final is not None
    assert torch.equal(sequence.final[:LENGTH], normed)
    with reference.hf_model(tiny_llama_dir) as model:
        expected = reference.hf_logits(model, ids)
    torch.testing.assert_close(core.model.logits(normed), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("session", [None, "s"])
def test_read_in_pieces_beside_others_keeps_the_same(
    core: EngineCore, tiny_llama_dir: Path, session: str | None
) -> None:
    ids = harness.text(tiny_llama_dir, 0, LENGTH)
    whole = start(core, ids, session)
    read(core, [(whole, LENGTH)])
    other = start(core, harness.text(tiny_llama_dir, 1, LENGTH), "s" if session is None else None)
    pieces = start(core, ids, session)
    read(core, [(other, 3), (pieces, 10)])
    read(core, [(pieces, 1), (other, 1)])
    read(core, [(other, 20), (pieces, 29)])
    for mine, lone in ((pieces.boundary, whole.boundary), (pieces.final, whole.final)):
        assert mine is not None
        assert lone is not None
        torch.testing.assert_close(mine[:LENGTH], lone[:LENGTH], atol=2e-5, rtol=1e-4)
    keys, lone_keys = pieces.cache.keys[:, :, :LENGTH], whole.cache.keys[:, :, :LENGTH]
    torch.testing.assert_close(keys, lone_keys, atol=2e-5, rtol=1e-4)


def test_trunk_of_a_read_is_the_same_for_every_session(
    core: EngineCore, tiny_llama_dir: Path
) -> None:
    ids = harness.text(tiny_llama_dir, 0, LENGTH)
    base, mine = start(core, ids), start(core, ids, "s")
    read(core, [(base, LENGTH)])
    read(core, [(mine, LENGTH)])
    assert base.boundary is not None
    assert mine.boundary is not None
    assert base.final is not None
    assert mine.final is not None
    assert torch.equal(base.boundary[:LENGTH], mine.boundary[:LENGTH])
    assert not torch.allclose(base.final[:LENGTH], mine.final[:LENGTH], atol=1e-2)


def test_replay_from_the_trunks_top_gives_the_same_as_a_whole_read(
    core: EngineCore, tiny_llama_dir: Path
) -> None:
    ids = harness.text(tiny_llama_dir, 0, LENGTH)
    sequence = start(core, ids, "s")
    (normed,) = read(core, [(sequence, LENGTH)])
    keys = sequence.cache.keys[:, :, :LENGTH].clone()
    sequence.computed, sequence.cache.length, sequence.known = 0, 0, LENGTH
    first, second = read(core, [(sequence, 25)])[0], read(core, [(sequence, 15)])[0]
    torch.testing.assert_close(torch.cat((first, second)), normed, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(sequence.cache.keys[:, :, :LENGTH], keys, atol=2e-5, rtol=1e-4)


def test_position_taken_back_is_read_again_the_same(core: EngineCore, tiny_llama_dir: Path) -> None:
    sequence = start(core, harness.text(tiny_llama_dir, 0, LENGTH))
    read(core, [(sequence, 20)])
    (once,) = read(core, [(sequence, 1)])
    core.reader.take_back([sequence])
    assert (sequence.computed, sequence.cache.length) == (20, 20)
    (again,) = read(core, [(sequence, 1)])
    assert torch.equal(once, again)


def test_buffers_made_while_serving_can_be_learned_from(core: EngineCore) -> None:
    with torch.inference_mode():
        boundary, final = core.reader.new_buffers(4)
    assert not boundary.is_inference()
    assert not final.is_inference()
