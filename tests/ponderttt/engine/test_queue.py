"""The waiting queue: order within a tenant, turns between tenants."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.config import TTTDefaults
from ponderttt.engine.queue import FairQueue
from ponderttt.engine.request import GenerateRequest, Tenant
from ponderttt.engine.resolve import resolve_ttt
from ponderttt.engine.sequence import Group

TTT = resolve_ttt(TTTParams(), TTTParams(), TTTDefaults(), "threshold", False)


def group(tenant: str | None, **request: Any) -> Group:
    return Group(GenerateRequest((1,), tenant=Tenant(tenant), **request), None, False, TTT, print)


def take_all(queue: FairQueue) -> list[Group]:
    taken = []
    while (head := queue.head) is not None:
        queue.take(head)
        taken.append(head)
    return taken


def test_tenants_take_turns_however_many_requests_one_of_them_has() -> None:
    queue = FairQueue()
    many = [group("a") for _ in range(5)]
    late = [group("b"), group("b"), group(None)]
    for each in many + late:
        queue.append(each)
    a, b = many, late
    expected = [a[0], b[0], b[2], a[1], b[1], a[2], a[3], a[4]]
    assert list(queue) == expected
    assert take_all(queue) == expected
    assert len(queue) == 0


def test_whoever_was_just_served_goes_behind_those_who_came_meanwhile() -> None:
    queue = FairQueue()
    first, second, other = group("a"), group("a"), group("b")
    queue.append(first)
    queue.append(second)
    queue.take(first)
    queue.append(other)
    assert take_all(queue) == [second, other]


def test_request_that_is_removed_leaves_the_others_their_turns() -> None:
    queue = FairQueue()
    groups = [group("a"), group("b"), group("a"), group("c")]
    for each in groups:
        queue.append(each)
    queue.remove(groups[0])
    queue.remove(groups[1])
    assert [queue.count(tenant) for tenant in ("a", "b", "c", None)] == [1, 0, 1, 0]
    assert take_all(queue) == [groups[2], groups[3]]
    with pytest.raises(ValueError, match="not in"):
        queue.remove(groups[0])


def test_older_than_names_those_that_came_before() -> None:
    queue = FairQueue()
    groups = [group("a", arrival=1.0), group("b", arrival=2.0), group("a", arrival=3.0)]
    for each in groups:
        queue.append(each)
    assert queue.older_than(1.0) == []
    assert queue.older_than(2.5) == groups[:2]


@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=40))
def test_nobody_is_served_twice_while_another_waits_longer(tenants: list[str | None]) -> None:
    queue = FairQueue()
    for tenant in tenants:
        queue.append(group(tenant))
    order = [each.request.tenant.id for each in take_all(queue)]
    assert Counter(order) == Counter(tenants)
    for place, tenant in enumerate(order):
        later = set(order[place + 1 :]) - {tenant}
        served = Counter(order[: place + 1])
        # Everybody who still waits has been served as often as this one, but for the last turn.
        assert all(served[other] >= served[tenant] - 1 for other in later)
