"""The options of the update rule: against PEFT and torch.optim, and what holds for each of them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.rules import UpdateRule
from ponderttt.adaptation.update import Write
from ponderttt.fast_weights.bank import AdapterState
from ponderttt.fast_weights.optimizer import adam_rows, clip_rows
from tests.ponderttt import reference
from tests.ponderttt.adaptation.writes import LENIENT, PeftSession, Session, World

TOLERANCE = 1e-5
#: One rule per option, and one with all of them.
RULES: dict[str, dict[str, Any]] = {
    "adam": {},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.1},
    "muon": {"optimizer": "muon"},
    "step_scales": {"step_scales": (1.0, 0.5, 0.3, 2.0)},
    "decay": {"decay": 0.2},
    "token_share": {"token_share": 0.4},
    "trust_region": {"trust_region": 0.02},
    "freeze_a": {"freeze_a": True},
    "all": {
        "optimizer": "sgd", "learning_rate": 0.1, "step_scales": (1.0, 0.5, 0.25, 2.0),
        "decay": 0.1, "token_share": 0.5, "trust_region": 0.05, "freeze_a": True,
    },
}  # fmt: skip
every_rule = pytest.mark.parametrize("name", RULES)


def rule_of(name: str) -> UpdateRule:
    return replace(LENIENT, beta1=0.6, **RULES[name])


def start(world: World, index: int, end: int = 100) -> Session:
    """A session that has read its own text."""
    session = world.session(f"s{index}", reference.code_ids(world.path, end, offset=200 * index))
    session.read(end)
    return session


def learned(world: World, sessions: list[tuple[Session, int, int, Action]]) -> list[Write]:
    writes = [session.write(begin, end, action) for session, begin, end, action in sessions]
    world.learn(writes)
    assert [write.failure for write in writes] == [None] * len(writes)
    return writes


def same_bits(ours: AdapterState, theirs: AdapterState) -> bool:
    pairs = zip(vectors(ours), vectors(theirs), strict=True)
    return ours.step == theirs.step and all(torch.equal(a, b) for a, b in pairs)


def vectors(state: AdapterState) -> tuple[Tensor, Tensor, Tensor]:
    return state.weights, state.first, state.second


@every_rule
def test_writes_equal_peft_and_torch_with_plain_loops(
    name: str, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sessions in one batch, two chunks each, of unequal length and steps."""
    # The one place where torch's Muon leaves float32.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    world = World(tiny_llama_dir, rule_of(name), targets="all")
    ends, actions = [(40, 90), (27, 71)], (Action.UPDATE_4, Action.UPDATE_2)
    with ExitStack() as stack:
        tokens = [reference.code_ids(world.path, 100, offset=300 * index) for index in range(2)]
        ours = [world.session(f"s{index}", ids) for index, ids in enumerate(tokens)]
        theirs = [
            PeftSession.start(stack, world, ids, tmp_path / str(index))
            for index, ids in enumerate(tokens)
        ]
        begins = [0, 0]
        for chunk in range(2):
            writes, expected = [], []
            for index, action in enumerate(actions):
                begin, end = begins[index], ends[index][chunk]
                ours[index].read(end)
                theirs[index].read(end)
                writes.append(ours[index].write(begin, end, action))
                expected.append(theirs[index].learn(begin, end, action.steps))
                begins[index] = end
            world.learn(writes)
            assert [write.failure for write in writes] == [None, None]
            for write, losses in zip(writes, expected, strict=True):
                assert write.losses == pytest.approx(losses, abs=TOLERANCE)
    for mine, peft in zip(ours, theirs, strict=True):
        got, wanted = world.bank.state(mine.slot, mine.owner).weights, peft.flat()
        assert float((wanted - world.bank.fresh_weights).norm()) > 1e-2
        # A gradient of about zero is scaled up by Adam and Muon, so rounding has a say in a few.
        assert ((got - wanted).abs() < TOLERANCE).float().mean() > 0.99
        torch.testing.assert_close(got, wanted, rtol=0, atol=20 * TOLERANCE)


@every_rule
def test_option_changes_the_update(name: str, tiny_llama_dir: Path) -> None:
    states = []
    for rule in (rule_of(name), rule_of("adam")):
        world = World(tiny_llama_dir, rule)
        session = start(world, 0)
        learned(world, [(session, 0, 100, Action.UPDATE_4)])
        states.append(world.bank.state(session.slot, session.owner).weights)
    assert torch.equal(*states) == (name == "adam")


@every_rule
def test_batch_equals_one_by_one(name: str, tiny_llama_dir: Path) -> None:
    actions = (Action.UPDATE_4, Action.UPDATE_1, Action.UPDATE_2)
    spans = ((0, 60), (5, 100), (33, 80))
    together = World(tiny_llama_dir, rule_of(name))
    sessions = [start(together, index) for index in range(3)]
    cases = [(s, *span, a) for s, span, a in zip(sessions, spans, actions, strict=True)]
    learned(together, cases)
    for index, session in enumerate(sessions):
        world = World(tiny_llama_dir, rule_of(name))
        alone = start(world, index)
        learned(world, [(alone, *spans[index], actions[index])])
        batched = together.bank.state(session.slot, session.owner)
        single = world.bank.state(alone.slot, alone.owner)
        assert batched.step == single.step
        for ours, theirs in zip(vectors(batched), vectors(single), strict=True):
            close = (ours - theirs).abs() < TOLERANCE
            # As above: rounding has a say where a gradient is about zero.
            assert close.float().mean() > 0.99
            torch.testing.assert_close(ours, theirs, rtol=0, atol=20 * TOLERANCE)


@every_rule
def test_update_4_passes_through_the_states_of_update_1_and_update_2(
    name: str, tiny_llama_dir: Path
) -> None:
    world = World(tiny_llama_dir, rule_of(name))
    session = start(world, 0)
    # Momentum from an earlier chunk, so that not everything is zero.
    learned(world, [(session, 0, 40, Action.UPDATE_2)])
    long = session.write(40, 100, Action.UPDATE_4)
    passed = []
    while not long.finished:
        world.writer.step([long])
        passed.append(long.staged.clone())
    for action in (Action.UPDATE_1, Action.UPDATE_2, Action.UPDATE_4):
        short = session.write(40, 100, action)
        while not short.finished:
            world.writer.step([short])
        assert same_bits(short.staged, passed[action.steps - 1])
        assert short.losses[:-1] == long.losses[: action.steps]


def test_default_rule_is_adam_with_clipping_bit_for_bit(tiny_llama_dir: Path) -> None:
    """Nothing of the options leaves a trace: rates, gradients and weights are as without them."""
    rule = replace(UpdateRule(), loss_tolerance=1e6)
    world = World(tiny_llama_dir, rule)
    session = start(world, 0)
    write = session.write(10, 90, Action.UPDATE_2)
    state = write.staged.clone()
    for _ in range(2):
        staged = state.weights[None].clone().requires_grad_()
        gradients, _ = world.writer._gradients([write], staged)
        new, first, second = adam_rows(
            state.weights[None], clip_rows(gradients, rule.max_grad_norm), state.first[None],
            state.second[None], torch.tensor([state.step + 1]), torch.full((1,), 1e-3),
            (0.9, 0.99), 1e-8,
        )  # fmt: skip
        state = AdapterState(new[0], first[0], second[0], state.step + 1)
        world.writer.step([write])
        assert same_bits(write.staged, state)


def test_unused_second_moment_stays_zero(tiny_llama_dir: Path) -> None:
    for name in ("sgd", "muon"):
        world = World(tiny_llama_dir, rule_of(name))
        session = start(world, 0)
        learned(world, [(session, 0, 100, Action.UPDATE_2)])
        state = world.bank.state(session.slot, session.owner)
        assert not state.second.any()
        assert state.first.any()


@pytest.mark.parametrize("radius", [1e-3, 0.02, 0.5])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "muon"])
def test_trust_region_is_never_left(optimizer: Any, radius: float, tiny_llama_dir: Path) -> None:
    rule = replace(LENIENT, optimizer=optimizer, learning_rate=0.05, trust_region=radius)
    world = World(tiny_llama_dir, rule)
    session = start(world, 0)
    fresh, distances = world.bank.fresh_weights, []
    for begin in (0, 30, 60):
        write = session.write(begin, begin + 40, Action.UPDATE_4)
        while not write.finished:
            world.writer.step([write])
            distances.append(float((write.staged.weights - fresh).norm()))
        assert write.failure is None
        world.bank.commit(write.tag, write.staged)
    # Weights near 0.1 are rounded to 7e-9 each.
    assert max(distances) <= radius * (1 + 1e-4)
    assert max(distances) > 0.99 * radius


def test_trust_region_does_not_undo_the_bound_of_the_roll_back(tiny_llama_dir: Path) -> None:
    rule = replace(LENIENT, learning_rate=0.05, trust_region=2.0, max_norm=0.5)
    world = World(tiny_llama_dir, rule)
    write = start(world, 0).write(0, 100, Action.UPDATE_1)
    world.learn([write])
    assert write.failure == "norm"


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "muon"])
def test_frozen_a_is_left_bit_for_bit(optimizer: Any, tiny_llama_dir: Path) -> None:
    rule = replace(LENIENT, optimizer=optimizer, freeze_a=True, decay=0.1, trust_region=0.01)
    world = World(tiny_llama_dir, rule)
    session = start(world, 0)
    for begin in (0, 50):
        learned(world, [(session, begin, begin + 50, Action.UPDATE_2)])
    state = world.bank.state(session.slot, session.owner)
    now = world.layout.views(state.weights[None])
    fresh = world.layout.views(world.bank.fresh_weights[None])
    for place, (a, b) in now.items():
        assert torch.equal(a, fresh[place][0])
        assert b.any()


def test_frozen_a_gives_its_share_of_the_clipped_norm_to_b(tiny_llama_dir: Path) -> None:
    rule = replace(
        LENIENT, optimizer="sgd", beta1=0.0, learning_rate=1.0, max_grad_norm=1e-3, freeze_a=True
    )
    world = World(tiny_llama_dir, rule)
    write = start(world, 0).write(0, 100)
    # B far from zero, so that the gradient of A is a large part of the whole.
    before = reference.random_weights(world.layout, seed=1, spread=0.5)
    write.staged.weights.copy_(before)
    world.writer.step([write])
    assert float((write.staged.weights - before).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_losses_and_verdict_are_of_all_tokens_whichever_count(tiny_llama_dir: Path) -> None:
    first_losses = []
    for share in (1.0, 0.3):
        world = World(tiny_llama_dir, replace(LENIENT, token_share=share))
        (write,) = learned(world, [(start(world, 0), 0, 100, Action.UPDATE_2)])
        first_losses.append(write.losses[0])
    assert first_losses[0] == first_losses[1]


@pytest.mark.parametrize(
    ("share", "runs"),
    [
        (1.0, [(0, 99)]),
        (0.5, [(6, 12), (31, 12), (55, 12), (80, 12)]),
        (0.25, [(8, 8), (33, 8), (57, 8), (82, 8)]),
        (0.01, [(8, 8), (33, 8), (57, 8), (82, 8)]),
    ],
)
def test_loss_after_is_the_loss_before_and_what_judged_tokens_changed(
    share: float, runs: list[tuple[int, int]], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """99 rows, of which no fewer than 32 are judged, after what was read before them."""
    rule = replace(LENIENT, judge_share=share)
    world = World(tiny_llama_dir, rule)
    (write,) = learned(world, [(start(world, 0), 0, 100, Action.UPDATE_2)])
    with ExitStack() as stack:
        tokens = reference.code_ids(world.path, 100)
        peft = PeftSession.start(stack, world, tokens, tmp_path)
        peft.read(100)

        def losses() -> Tensor:
            # A run of rows a … b-1 predicts the tokens a+1 … b.
            with torch.no_grad():
                return torch.cat([peft.row_losses(a + 1, a + n + 1) for a, n in runs])

        with torch.no_grad():
            whole = peft.row_losses(0, 100).mean()
        before = losses()
        peft.learn(0, 100, 2)
        expected = whole + (losses() - before).mean()
    assert write.losses[-1] == pytest.approx(float(expected), abs=TOLERANCE)
    (exact,) = learned(world, [(start(world, 1), 0, 100, Action.UPDATE_2)])
    full = World(tiny_llama_dir, LENIENT)
    (other,) = learned(full, [(start(full, 1), 0, 100, Action.UPDATE_2)])
    assert same_bits(exact.staged, other.staged)


@pytest.mark.parametrize(("share", "count"), [(0.001, 1), (0.25, 10), (0.5, 20), (0.99, 40)])
def test_share_of_tokens_is_rounded_and_at_least_one(
    share: float, count: int, tiny_llama_dir: Path
) -> None:
    world = World(tiny_llama_dir, replace(LENIENT, token_share=share))
    (write,) = learned(world, [(start(world, 0), 10, 50, Action.UPDATE_1)])
    assert write.emphasis is not None
    assert int(write.emphasis.count_nonzero()) == count
    assert float(write.emphasis.mean()) == pytest.approx(1.0)


def test_write_that_is_not_finite_leaves_the_others_of_its_batch(tiny_llama_dir: Path) -> None:
    for name in ("sgd", "muon", "token_share", "trust_region"):
        world = World(tiny_llama_dir, rule_of(name))
        sessions = [start(world, index) for index in range(2)]
        writes = [session.write(0, 100, Action.UPDATE_2) for session in sessions]
        writes[0].boundary[3] = float("nan")
        world.learn(writes)
        assert [write.failure for write in writes] == ["not_finite", None]
        assert writes[1].staged.weights.isfinite().all()
