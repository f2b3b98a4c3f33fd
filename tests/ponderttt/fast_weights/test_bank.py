"""The bank: one owner per slot, one version per step, nothing leaks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ponderttt.fast_weights.bank import (
    BASE_SLOT,
    AdapterBank,
    AdapterState,
    OwnershipError,
    StepTag,
)
from ponderttt.fast_weights.layout import AdapterLayout, LoRAConfig
from ponderttt.models.checkpoint import load_decoder
from ponderttt.models.decoder import Decoder
from tests.ponderttt import reference

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def decoder(tiny_llama_dir: Path) -> Decoder:
    return load_decoder(tiny_llama_dir)


@pytest.fixture(scope="module")
def layout(decoder: Decoder) -> AdapterLayout:
    return AdapterLayout(decoder, LoRAConfig(rank=4))


@pytest.fixture
def bank(layout: AdapterLayout) -> AdapterBank:
    return AdapterBank(layout, 3, CPU, torch.float32)


def state(layout: AdapterLayout, seed: int, step: int = 0) -> AdapterState:
    weights = reference.random_weights(layout, seed)
    moments = reference.noise(2, layout.size, seed=seed)
    return AdapterState(weights, moments[0].clone(), moments[1].abs(), step)


def assert_same(ours: AdapterState, theirs: AdapterState) -> None:
    assert torch.equal(ours.weights, theirs.weights)
    assert torch.equal(ours.first, theirs.first)
    assert torch.equal(ours.second, theirs.second)
    assert ours.step == theirs.step


def write_tag(bank: AdapterBank, slot: int, owner: str) -> StepTag:
    return StepTag(slot, owner, bank.version(slot), "WRITE")


def test_state_comes_back_as_it_was_put_in(bank: AdapterBank, layout: AdapterLayout) -> None:
    given = state(layout, 1, step=7)
    slot = bank.allocate("ann", given, version=5)
    assert slot != BASE_SLOT
    assert bank.version(slot) == 5
    assert_same(bank.state(slot, "ann"), given)
    assert_same(bank.release(slot, "ann"), given)


def test_state_is_a_copy(bank: AdapterBank, layout: AdapterLayout) -> None:
    given = state(layout, 1)
    slot = bank.allocate("ann", given, 0)
    kept = given.clone()
    given.weights.zero_()
    bank.state(slot, "ann").weights.zero_()
    bank.fresh_state().weights.zero_()
    assert_same(bank.state(slot, "ann"), kept)
    assert bank.fresh_weights.abs().sum() > 0


def test_release_wipes_the_slot(bank: AdapterBank, layout: AdapterLayout, decoder: Decoder) -> None:
    slot = bank.allocate("ann", state(layout, 1), 0)
    bank.release(slot, "ann")
    # Whoever reads the freed slot (a bug) sees zeros, not Ann's weights.
    adapter = bank.read([StepTag(slot, None, bank.version(slot))], [20])
    ids = reference.random_ids(512, 20)
    read = reference.forward(decoder, [(decoder.new_cache(20), 0, ids)], adapter)[0]
    assert torch.equal(read, reference.our_logits(decoder, ids))
    assert bank.allocate("bob", bank.fresh_state(), 0) == slot
    assert_same(bank.state(slot, "bob"), bank.fresh_state())


def test_slots_are_counted_and_run_out(bank: AdapterBank) -> None:
    assert (bank.capacity, bank.occupied, bank.has_room) == (3, 0, True)
    slots = [bank.allocate(name, bank.fresh_state(), 0) for name in ("ann", "bob", "cid")]
    assert sorted(slots) == [1, 2, 3]
    assert (bank.occupied, bank.has_room) == (3, False)
    with pytest.raises(OwnershipError, match="3 slots"):
        bank.allocate("dan", bank.fresh_state(), 0)
    bank.release(slots[1], "bob")
    assert bank.allocate("dan", bank.fresh_state(), 0) == slots[1]


def test_owner_holds_one_slot_only(bank: AdapterBank) -> None:
    bank.allocate("ann", bank.fresh_state(), 0)
    with pytest.raises(OwnershipError, match="already"):
        bank.allocate("ann", bank.fresh_state(), 0)
    assert bank.occupied == 1


def test_slot_answers_to_its_owner_only(bank: AdapterBank, layout: AdapterLayout) -> None:
    slot = bank.allocate("ann", state(layout, 1), 0)
    before = bank.state(slot, "ann")
    with pytest.raises(OwnershipError, match="'ann', not to 'bob'"):
        bank.state(slot, "bob")
    with pytest.raises(OwnershipError):
        bank.release(slot, "bob")
    with pytest.raises(OwnershipError):
        bank.read([bank.tag(slot, "bob")], [1])
    with pytest.raises(OwnershipError):
        bank.read([StepTag(BASE_SLOT, None, 0), bank.tag(slot, None)], [1, 1])
    with pytest.raises(OwnershipError):
        bank.commit(write_tag(bank, slot, "bob"), bank.fresh_state())
    with pytest.raises(OwnershipError):
        bank.release(bank.allocate("cid", bank.fresh_state(), 0), "ann")
    assert_same(bank.state(slot, "ann"), before)
    assert bank.version(slot) == 0


def test_commit_makes_the_next_version_for_its_owner_alone(
    bank: AdapterBank, layout: AdapterLayout
) -> None:
    ann = bank.allocate("ann", state(layout, 1), 4)
    bob = bank.allocate("bob", state(layout, 2), 9)
    untouched, new = bank.state(bob, "bob"), state(layout, 3, step=2)
    assert bank.commit(write_tag(bank, ann, "ann"), new) == 5
    assert (bank.version(ann), bank.version(bob), bank.version(BASE_SLOT)) == (5, 9, 0)
    assert_same(bank.state(ann, "ann"), new)
    assert_same(bank.state(bob, "bob"), untouched)


def test_stale_version_is_refused_on_read_and_on_commit(
    bank: AdapterBank, layout: AdapterLayout
) -> None:
    slot = bank.allocate("ann", bank.fresh_state(), 0)
    read, write = bank.tag(slot, "ann"), write_tag(bank, slot, "ann")
    bank.commit(write, state(layout, 1))
    committed = bank.state(slot, "ann")
    with pytest.raises(OwnershipError, match="version 1, not 0"):
        bank.read([read], [3])
    with pytest.raises(OwnershipError, match="version 1, not 0"):
        bank.commit(write, state(layout, 2))
    assert_same(bank.state(slot, "ann"), committed)


def test_commit_by_a_read_tag_or_to_a_slot_without_owner_is_refused(
    bank: AdapterBank, layout: AdapterLayout, decoder: Decoder
) -> None:
    slot = bank.allocate("ann", bank.fresh_state(), 0)
    free = next(s for s in range(1, 4) if s != slot)
    for tag in (
        bank.tag(slot, "ann"),
        StepTag(BASE_SLOT, None, 0, "WRITE"),
        StepTag(free, None, bank.version(free), "WRITE"),
    ):
        with pytest.raises(OwnershipError, match="does not allow a write"):
            bank.commit(tag, state(layout, 1))
    ids = reference.random_ids(512, 20)
    # The base slot beside Ann's still adapts nothing.
    adapter = bank.read([StepTag(BASE_SLOT, None, 0), bank.tag(slot, "ann")], [20, 20])
    caches = [(decoder.new_cache(20), 0, ids) for _ in range(2)]
    for logits in reference.forward(decoder, caches, adapter):
        torch.testing.assert_close(
            logits, reference.our_logits(decoder, ids), rtol=0, atol=reference.SPLIT_TOLERANCE
        )


def test_read_of_nothing_but_the_base_slot_needs_no_adapter(bank: AdapterBank) -> None:
    assert bank.read([StepTag(BASE_SLOT, None, 0)] * 3, [1, 5, 2]) is None


def test_read_of_several_owners_gives_each_its_own_logits(
    bank: AdapterBank, layout: AdapterLayout, decoder: Decoder
) -> None:
    owners = ["ann", "bob", None, "cid"]
    states = {name: state(layout, seed) for seed, name in enumerate(owners) if name}
    slots = {name: bank.allocate(name, given, 0) for name, given in states.items()}
    tags = [bank.tag(slots[name] if name else BASE_SLOT, name) for name in owners]
    texts = [reference.random_ids(512, count, seed=count) for count in (30, 1, 17, 22)]
    adapter = bank.read(tags, [len(ids) for ids in texts])
    pieces = [(decoder.new_cache(len(ids)), 0, ids) for ids in texts]
    for name, ids, logits in zip(
        owners, texts, reference.forward(decoder, pieces, adapter), strict=True
    ):
        weights = states[name].weights if name else None
        alone = reference.our_logits(decoder, ids, layout, weights)
        torch.testing.assert_close(logits, alone, rtol=0, atol=reference.SPLIT_TOLERANCE)
        if name:
            assert (alone - reference.our_logits(decoder, ids)).abs().max() > 0.1


def test_digest_tells_weights_apart_and_ignores_the_optimiser(layout: AdapterLayout) -> None:
    given = state(layout, 1)
    assert len(given.digest()) == 64
    same = AdapterState(given.weights.clone(), given.second, given.first, step=3)
    assert same.digest() == given.digest()
    same.weights[-1] = torch.nextafter(same.weights[-1], torch.tensor(9.0))
    assert same.digest() != given.digest()
    half = given.weights.bfloat16()
    assert len(AdapterState(half, half, half).digest()) == 64


def test_state_knows_its_size_and_moves_as_a_whole(layout: AdapterLayout) -> None:
    given = state(layout, 1, step=3)
    assert given.nbytes == 3 * 4 * layout.size
    assert_same(given.to(CPU), given)
    twin = given.clone()
    twin.weights.zero_()
    assert given.weights.abs().sum() > 0
