"""The waiting queue: first come, first served within a tenant, in turn between tenants."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ponderttt.engine.sequence import Group


class FairQueue:
    """Requests that wait. Whoever sends many holds up only themselves.

    The tenants stand in a ring; the first one's oldest request is the queue's head, and a tenant
    whose request has been taken goes to the ring's end. `count` and `len` may be called from any
    thread.
    """

    def __init__(self) -> None:
        self._by_tenant: dict[str | None, deque[Group]] = {}

    def __len__(self) -> int:
        return sum(len(groups) for groups in list(self._by_tenant.values()))

    def __iter__(self) -> Iterator[Group]:
        """In the order in which they will be taken if nobody else comes."""
        columns = [list(groups) for groups in self._by_tenant.values()]
        for place in range(max(map(len, columns), default=0)):
            yield from (column[place] for column in columns if place < len(column))

    @property
    def head(self) -> Group | None:
        """Whose turn it is."""
        groups = next(iter(self._by_tenant.values()), None)
        return groups[0] if groups else None

    def count(self, tenant: str | None) -> int:
        """Requests of one tenant."""
        return len(self._by_tenant.get(tenant, ()))

    def append(self, group: Group) -> None:
        """Let a request wait behind the others of its tenant."""
        self._by_tenant.setdefault(group.request.tenant.id, deque()).append(group)

    def put_back(self, group: Group) -> None:
        """Let a request that has begun wait before the others of its tenant."""
        self._by_tenant.setdefault(group.request.tenant.id, deque()).appendleft(group)

    def take(self, group: Group) -> None:
        """Take the head off; its tenant's next request waits for the other tenants' turns."""
        self.remove(group)
        tenant = group.request.tenant.id
        if (others := self._by_tenant.pop(tenant, None)) is not None:
            self._by_tenant[tenant] = others

    def remove(self, group: Group) -> None:
        """Take any request off; ValueError where it does not wait here."""
        tenant = group.request.tenant.id
        groups = self._by_tenant.get(tenant, deque())
        groups.remove(group)
        if not groups:
            del self._by_tenant[tenant]

    def older_than(self, arrival: float) -> list[Group]:
        """Requests that arrived before `arrival` (monotonic clock) and have not begun."""
        return [g for g in self if g.request.arrival < arrival and not g.has_begun]
