"""Rollouts in other processes are those of this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ponderttt.errors import InvalidRequestError
from tests.training.ppo.toys import ToyEnv, small_mdp
from training.ppo import ray_source
from training.ppo.network import ActorCritic
from training.ppo.ray_source import RaySource
from training.ppo.rollout import CombinedSource, InProcessSource, RolloutBatch, RolloutSource

ray: Any = pytest.importorskip("ray")

SIZES = (8,)


def make(seed: int, budgets: tuple[float, ...] = (2.0, 3.0)) -> RolloutSource:
    return InProcessSource(ToyEnv(small_mdp(), budgets, 2 + seed, seed), 5, SIZES, seed)


FACTORIES = [partial(make, 0), partial(make, 1)]


@pytest.fixture(scope="module")
def source() -> Iterator[RaySource]:
    made = RaySource(FACTORIES)
    yield made
    made.close()
    assert not ray.is_initialized()


def assert_equal(one: RolloutBatch, other: RolloutBatch) -> None:
    for field in fields(RolloutBatch):
        assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


def test_workers_give_what_their_sources_give_here_and_go_on_from_a_state(
    source: RaySource,
) -> None:
    here = CombinedSource([factory() for factory in FACTORIES])
    assert (source.num_envs, source.budgets) == (here.num_envs, here.budgets)
    policies = [ActorCritic(SIZES, seed).state_dict() for seed in (2, 3)]
    assert_equal(source.collect(policies[0]), here.collect(policies[0]))
    state = source.state_dict()
    expected = here.collect(policies[1])
    assert_equal(source.collect(policies[1]), expected)
    # Back, here and there: the states are of one form.
    source.load_state_dict(state)
    assert_equal(source.collect(policies[1]), expected)
    here.load_state_dict(state)
    assert_equal(here.collect(policies[1]), expected)
    with pytest.raises(InvalidRequestError, match="workers: 2; the run that is resumed had 1"):
        source.load_state_dict({"sources": state["sources"][:1]})


def test_no_worker_at_all_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="workers: must be at least 1"):
        RaySource([])


class Stub:
    """What is used of Ray, in this process: handles are answers, and calls are counted."""

    def __init__(self, running: bool) -> None:
        self.running = running
        self.killed = 0

    def is_initialized(self) -> bool:
        return self.running

    def init(self, **_: Any) -> None:
        self.running = True

    def shutdown(self) -> None:
        self.running = False

    def kill(self, _: object) -> None:
        self.killed += 1

    def remote(self, **_: Any) -> Callable[[Callable[..., Any]], Any]:
        return lambda kind: SimpleNamespace(remote=lambda *given: Remote(kind(*given)))

    def get(self, answers: list[Any]) -> list[Any]:
        return answers


class Remote:
    """An object whose methods are asked for by `remote`."""

    def __init__(self, inner: object) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self._inner, name))


@pytest.mark.parametrize("running", [True, False])
def test_different_budgets_are_refused_and_only_what_was_started_is_stopped(
    monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    stub = Stub(running)
    monkeypatch.setattr(ray_source, "_ray", lambda: stub)
    with pytest.raises(InvalidRequestError, match="the same budgets in the same order"):
        RaySource([partial(make, 0, (2.0,)), partial(make, 1, (3.0,))])
    assert stub.killed == 2
    assert stub.running == running


def test_a_worker_that_cannot_be_made_leaves_nothing_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stub = Stub(running=False)
    monkeypatch.setattr(ray_source, "_ray", lambda: stub)

    def fail() -> RolloutSource:
        raise RuntimeError("no such corpus")

    with pytest.raises(RuntimeError, match="no such corpus"):
        RaySource([FACTORIES[0], fail])
    assert not stub.running
