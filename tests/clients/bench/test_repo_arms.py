"""What the arms `random` and `fixed` are, as their description has it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from clients.bench.repo_arms import Arm, adapt_options
from ponderttt.adaptation.ledger import Account


def updates(wants: Callable[[], bool], budget: float, chunks: int) -> list[bool]:
    """Which chunks of one request the server's ledger lets a gate update."""
    account, taken = Account(), []
    for number in range(chunks):
        taken.append(wants() and account.allows(3.0, budget, chunks - 1 - number))
        account.charge(3.0 if taken[-1] else 1.0)
    return taken


def budget(kind: str, rate: float) -> float:
    """What an arm asks for that follows another of this rate."""
    arm = Arm("follower", "random" if kind == "random" else "fixed", kind, None, "lead", "rate")
    lesson = {"chunks": 100, "eligible": 100, "updates": round(100 * rate)}
    return float(adapt_options(arm, [lesson], None, 0)["budget"])


@pytest.mark.parametrize(("rate", "taken"), [(0.25, 0.22), (0.5, 0.47), (0.75, 0.72)])
def test_random_stays_as_far_below_the_rate_as_said(rate: float, taken: float) -> None:
    rng = random.Random(0)
    runs = [updates(lambda: rng.random() < rate, budget("random", rate), 100) for _ in range(200)]
    assert sum(map(sum, runs)) / 20_000 == pytest.approx(taken, abs=0.01)


def test_fixed_meets_the_rate_in_runs_as_said() -> None:
    taken = updates(lambda: True, budget("fixed", 0.25), 128)
    assert taken == ([True] * 16 + [False] * 48) * 2
