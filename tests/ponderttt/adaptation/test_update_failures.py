"""Writes that fail or must not be seen: nobody else notices, and nothing is half done."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.update import Write
from ponderttt.fast_weights.bank import AdapterState, OwnershipError
from ponderttt.models.decoder import Decoder
from ponderttt.models.layers import FusedLinear, LayerNorm, RMSNorm
from tests.ponderttt import reference
from tests.ponderttt.adaptation.writes import LENIENT, Session, World

ENDS = (40, 64, 25)


def three_sessions(path: Path, world: World | None = None) -> list[Session]:
    """Three sessions that have read texts of unequal length."""
    world = world or World(path)
    sessions = []
    for index, end in enumerate(ENDS):
        tokens = reference.code_ids(path, end, offset=200 * index)
        sessions.append(world.session(f"s{index}", tokens))
        sessions[-1].read(end)
    return sessions


def begin(sessions: Iterable[Session], action: Action = Action.UPDATE_2) -> list[Write]:
    return [session.write(5, session.done, action) for session in sessions]


def base_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """Every tensor of the shared model, by a name."""
    found = {"embedding": decoder.embedding, "head": decoder.head.weight}
    if decoder.position_embedding is not None:
        found["positions"] = decoder.position_embedding
    if decoder.rotary is not None:
        found |= {"cos": decoder.rotary.cos, "sin": decoder.rotary.sin}
    parts: list[tuple[str, FusedLinear | RMSNorm | LayerNorm]] = [("norm", decoder.final_norm)]
    for layer, block in enumerate(decoder.blocks):
        parts += [(f"{layer}/{i}", linear) for i, linear in enumerate(block.linears())]
        parts += [(f"{layer}/a", block.attention_norm), (f"{layer}/m", block.mlp_norm)]
    for name, part in parts:
        weight = part.matrix.weight if isinstance(part, FusedLinear) else part.weight
        found[f"{name}/weight"] = weight
        bias = None if isinstance(part, RMSNorm) else part.bias
        if bias is not None:
            found[f"{name}/bias"] = bias
    return found


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def state_bytes(state: AdapterState) -> tuple[bytes, bytes, bytes, int]:
    return as_bytes(state.weights), as_bytes(state.first), as_bytes(state.second), state.step


def held(session: Session) -> AdapterState:
    return session.world.bank.state(session.slot, session.owner)


@pytest.mark.parametrize("family", reference.FAMILIES)
def test_write_and_commit_leave_base_caches_and_other_slots_bit_for_bit(
    family: str, request: pytest.FixtureRequest
) -> None:
    world = World(request.getfixturevalue(family), targets="all")
    sessions = three_sessions(world.path, world)
    bank, writer = world.bank, sessions[1]
    base = {name: as_bytes(t) for name, t in base_tensors(world.decoder).items()}
    # The slots of the bank itself, the base slot and the free ones included.
    stores = (bank._weights, bank._first, bank._second)
    slots = [[as_bytes(row) for row in store] for store in stores]
    fresh = as_bytes(bank.fresh_weights)
    past = [(as_bytes(s.cache.keys), as_bytes(s.cache.values)) for s in sessions]
    boundaries = [as_bytes(session.boundary) for session in sessions]
    world.learn(begin([writer]))
    assert bank.version(writer.slot) == 1
    assert {name: as_bytes(t) for name, t in base_tensors(world.decoder).items()} == base
    for store, before in zip(stores, slots, strict=True):
        changed = [i for i, row in enumerate(store) if as_bytes(row) != before[i]]
        assert changed == [writer.slot]
    assert as_bytes(bank.fresh_weights) == fresh
    assert [(as_bytes(s.cache.keys), as_bytes(s.cache.values)) for s in sessions] == past
    assert [as_bytes(session.boundary) for session in sessions] == boundaries


def test_steps_are_invisible_until_the_commit(tiny_llama_dir: Path) -> None:
    sessions = three_sessions(tiny_llama_dir)
    world, before = sessions[0].world, [state_bytes(held(session)) for session in sessions]
    writes = begin(sessions)
    tags = [world.bank.tag(session.slot, session.owner) for session in sessions]
    world.writer.step(writes)
    assert [write.steps_done for write in writes] == [1, 1, 1]
    assert not any(write.finished for write in writes)
    assert [state_bytes(held(session)) for session in sessions] == before
    # A read that began before the write is still of the version it was begun with.
    assert world.bank.read(tags, [1, 1, 1]) is not None
    world.writer.step(writes)
    assert all(write.finished and write.failure is None for write in writes)
    assert [state_bytes(held(session)) for session in sessions] == before


def test_writes_of_unequal_actions_finish_one_after_another(tiny_llama_dir: Path) -> None:
    sessions = three_sessions(tiny_llama_dir)
    actions = (Action.UPDATE_4, Action.UPDATE_1, Action.UPDATE_2)
    writes = [
        session.write(0, session.done, action)
        for session, action in zip(sessions, actions, strict=True)
    ]
    sessions[0].world.learn(writes)
    assert [write.steps_done for write in writes] == [4, 1, 2]
    assert [len(write.losses) for write in writes] == [5, 2, 3]
    assert [held(session).step for session in sessions] == [4, 1, 2]
    assert [session.world.bank.version(session.slot) for session in sessions] == [1, 1, 1]


def test_commit_of_a_stale_version_is_refused(tiny_llama_dir: Path) -> None:
    (session, *_) = three_sessions(tiny_llama_dir)
    world = session.world
    first, second = begin([session, session], Action.UPDATE_1)
    world.writer.step([first])
    world.writer.step([second])
    world.bank.commit(first.tag, first.staged)
    committed = state_bytes(held(session))
    with pytest.raises(OwnershipError, match="version 1, not 0"):
        world.bank.commit(second.tag, second.staged)
    assert state_bytes(held(session)) == committed


def test_commit_to_a_slot_that_changed_hands_is_refused(tiny_llama_dir: Path) -> None:
    (session, *_) = three_sessions(tiny_llama_dir)
    world = session.world
    (write,) = begin([session], Action.UPDATE_1)
    world.writer.step([write])
    world.bank.release(session.slot, session.owner)
    assert world.bank.allocate("heir", world.bank.fresh_state(), 0) == session.slot
    with pytest.raises(OwnershipError, match="'heir', not to 's0'"):
        world.bank.commit(write.tag, write.staged)
    assert held(replace(session, owner="heir")).digest() == world.bank.fresh_state().digest()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", ["boundary", "weights", "second"])
def test_value_that_is_not_finite_fails_its_own_write_only(
    value: float, at: str, tiny_llama_dir: Path
) -> None:
    sessions = three_sessions(tiny_llama_dir)
    world = sessions[0].world
    good, spoiled, without = begin(sessions), begin(sessions), begin([sessions[0], sessions[2]])
    match at:
        case "boundary":
            spoiled[1].boundary = spoiled[1].boundary.clone()
            spoiled[1].boundary[7, 3] = value
        case "weights":
            spoiled[1].staged.weights[11] = value
        case "second":
            spoiled[1].staged.second[11] = value
    for writes in (good, spoiled, without):
        while active := [write for write in writes if not write.finished]:
            world.writer.step(active)
    assert [write.failure for write in spoiled] == [None, "not_finite", None]
    # Given up at once: no second step, and no replay to judge it by.
    assert (spoiled[1].steps_done, len(spoiled[1].losses)) == (1, 1)
    assert [write.failure for write in good + without] == [None] * 5
    for index, alone in ((0, without[0]), (2, without[1])):
        torch.testing.assert_close(
            spoiled[index].staged.weights, alone.staged.weights, rtol=0, atol=1e-5
        )
        assert spoiled[index].losses == pytest.approx(alone.losses, abs=1e-5)
        # The first step saw the same shapes, so that not even rounding differs.
        assert spoiled[index].losses[0] == good[index].losses[0]
    before = state_bytes(held(sessions[1]))
    for write in spoiled:
        if write.failure is None:
            world.bank.commit(write.tag, write.staged)
    assert [world.bank.version(session.slot) for session in sessions] == [1, 0, 1]
    assert state_bytes(held(sessions[1])) == before


def test_not_finite_gradient_of_one_write_leaves_the_others_bit_for_bit(
    tiny_llama_dir: Path,
) -> None:
    sessions = three_sessions(tiny_llama_dir)
    good, spoiled = begin(sessions, Action.UPDATE_1), begin(sessions, Action.UPDATE_1)
    spoiled[1].boundary = spoiled[1].boundary * math.nan
    sessions[0].world.writer._gradient_step(good)
    sessions[0].world.writer._gradient_step(spoiled)
    for index in (0, 2):
        assert state_bytes(spoiled[index].staged) == state_bytes(good[index].staged)


def test_weights_beyond_the_norm_bound_fail(tiny_llama_dir: Path) -> None:
    probe = three_sessions(tiny_llama_dir)
    writes = begin(probe)
    probe[0].world.learn(writes)
    fresh = probe[0].world.bank.fresh_weights
    distances = sorted(float((write.staged.weights - fresh).norm()) for write in writes)
    bound = (distances[1] + distances[2]) / 2
    assert distances[1] < bound < distances[2]
    sessions = three_sessions(
        tiny_llama_dir, World(tiny_llama_dir, replace(LENIENT, max_norm=bound))
    )
    limited = begin(sessions)
    sessions[0].world.learn(limited)
    beyond = [float((write.staged.weights - fresh).norm()) > bound for write in writes]
    assert [write.failure for write in limited] == [
        "norm" if is_beyond else None for is_beyond in beyond
    ]
    for session, is_beyond in zip(sessions, beyond, strict=True):
        assert session.world.bank.version(session.slot) == (0 if is_beyond else 1)
        assert (held(session).step == 0) is is_beyond


@pytest.mark.parametrize(("margin", "failure"), [(-1e-3, "loss"), (1e-3, None)])
def test_loss_that_grows_beyond_the_tolerance_fails(
    margin: float, failure: str | None, tiny_llama_dir: Path
) -> None:
    """A learning rate a hundred times too high makes the chunk's own loss worse."""
    harmful = replace(LENIENT, learning_rate=1.0)
    sessions = three_sessions(tiny_llama_dir, World(tiny_llama_dir, harmful))
    (probe,) = begin(sessions[:1])
    while not probe.finished:
        sessions[0].world.writer.step([probe])
    growth = probe.losses[-1] - probe.losses[0]
    assert growth > 0.1
    rule = replace(harmful, loss_tolerance=growth + margin)
    sessions = three_sessions(tiny_llama_dir, World(tiny_llama_dir, rule))
    (write,) = begin(sessions[:1])
    sessions[0].world.learn([write])
    assert write.failure == failure
    assert sessions[0].world.bank.version(sessions[0].slot) == (0 if failure else 1)


def test_failed_write_can_be_followed_by_a_good_one(tiny_llama_dir: Path) -> None:
    (session, *_) = three_sessions(tiny_llama_dir)
    (bad,) = begin([session])
    bad.boundary = bad.boundary * math.nan
    session.world.learn([bad])
    (good,) = begin([session])
    session.world.learn([good])
    (twin, *_) = three_sessions(tiny_llama_dir)
    (alone,) = begin([twin])
    twin.world.learn([alone])
    assert (bad.failure, good.failure) == ("not_finite", None)
    assert state_bytes(held(session)) == state_bytes(held(twin))
