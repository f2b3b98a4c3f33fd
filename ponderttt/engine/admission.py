"""Admission: keeps requests waiting, and gives them what they need to run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator

from ponderttt.engine.arrivals import Arrivals
from ponderttt.engine.config import EngineConfig
from ponderttt.engine.kv_reservations import KVReservations
from ponderttt.engine.queue import FairQueue
from ponderttt.engine.request import GenerateRequest, Request, Tenant
from ponderttt.engine.sequence import Group
from ponderttt.engine.sequence_factory import SequenceFactory
from ponderttt.engine.weights_selector import WeightsSelector
from ponderttt.errors import NotFoundError, OverloadedError
from ponderttt.sessions.manager import SessionManager

# Requests from the queue's head on whose sessions are read from the store at one time, at most:
# what has come is in RAM until its request begins.
_READ_AHEAD = 8


class Admission:
    """The door of the engine: in its thread only, but for what may be asked from any.

    Args:
        sessions, kv, weights, factory: the engine's.
        config: its limits.
    """

    def __init__(
        self,
        sessions: SessionManager,
        kv: KVReservations,
        weights: WeightsSelector,
        factory: SequenceFactory,
        config: EngineConfig,
    ) -> None:
        self._sessions = sessions
        self._kv = kv
        self._weights = weights
        self._factory = factory
        self._config = config
        # Apart, so that no completion waits behind a document that takes minutes.
        self._completions = FairQueue()
        self._adapts = FairQueue()
        self._arrivals = Arrivals(sessions)

    # --- waiting --------------------------------------------------------------------------------

    def enqueue(self, group: Group) -> None:
        """Let the request wait its turn.

        Raises:
            OverloadedError: the queue is full, or its tenant's part of it.
        """
        self.check_room(group.request.tenant)
        self._queue(group).append(group)

    def check_room(self, tenant: Tenant, arriving: int = 0, arriving_of_tenant: int = 0) -> None:
        """Raise OverloadedError where no further request may wait; from any thread.

        Args:
            tenant: who asks.
            arriving, arriving_of_tenant: requests on their way to the queue: all, and theirs.
        """
        if self.waiting + arriving >= self._config.max_waiting:
            raise OverloadedError(
                f"{self._config.max_waiting} requests are waiting, which is the limit; retry later"
            )
        theirs = self._completions.count(tenant.id) + self._adapts.count(tenant.id)
        if tenant.max_waiting is not None and theirs + arriving_of_tenant >= tenant.max_waiting:
            raise OverloadedError(
                f"{tenant.max_waiting} requests of yours are waiting, which is the limit for one "
                "key; retry later"
            )

    @property
    def waiting(self) -> int:
        """Requests in the queue; from any thread."""
        return len(self._completions) + len(self._adapts)

    def queued(self) -> list[Group]:
        """All requests that wait."""
        return [*self._completions, *self._adapts]

    def forget(self, group: Group) -> bool:
        """Take a request off the queue; whether it was there."""
        queue = self._queue(group)
        if group not in queue:
            return False
        queue.remove(group)
        self._arrivals.forget(group.session)
        return True

    def overdue(self) -> list[tuple[Group, OverloadedError]]:
        """Take off the queue what has waited too long, each with what to tell its caller."""
        limit = self._config.max_wait_seconds
        if limit is None:
            return []
        then = time.monotonic() - limit
        late = [*self._completions.older_than(then), *self._adapts.older_than(then)]
        for group in late:
            self.forget(group)
        message = f"the request has waited {limit:g} s, which is the limit; retry later"
        return [(group, OverloadedError(message)) for group in late]

    # --- whose turn it is -----------------------------------------------------------------------

    def next(self, running: Iterable[Group]) -> Group | None:
        """The waiting request whose turn it is, if there is a place for it beside `running`."""
        running = list(running)
        places = self._config.max_num_seqs
        for group in running:
            if not (group.is_adapt or group.background):
                places -= max(len(group.sequences), _sequences(group.request))
        head = self._first_at_hand(self._completions)
        if head is not None and _sequences(head.request) <= places:
            return head
        adapting = _adapting_by_tenant(running)
        if adapting.total() >= self._config.max_adapting:
            return None
        waiting = self._at_hand(self._adapts)
        return min(waiting, key=lambda g: adapting[g.request.tenant.id], default=None)

    def pause(self, group: Group, running: Iterable[Group]) -> bool:
        """Have documents that are between two windows wait, where it is somebody else's turn.

        Else whoever came first with documents that take minutes would hold every place as long.

        Returns:
            Whether they wait now; they hold nothing meanwhile.
        """
        adapting = _adapting_by_tenant(running)
        mine = adapting[group.request.tenant.id]
        if not any(adapting[g.request.tenant.id] < mine for g in self._at_hand(self._adapts)):
            return False
        self.release(group)
        self._adapts.put_back(group)
        return True

    def _first_at_hand(self, queue: FairQueue) -> Group | None:
        """Whose turn it is, of those whose session need not be read from the store first."""
        head = queue.head
        if head is None or not self._arrivals.is_awaited(head.session):
            return head
        return next(self._at_hand(queue), None)

    def _at_hand(self, queue: FairQueue) -> Iterator[Group]:
        awaited = 0
        for group in queue:
            if self._arrivals.is_awaited(group.session, send_for=awaited < _READ_AHEAD):
                awaited += 1
            else:
                yield group

    @property
    def awaits_sessions(self) -> bool:
        """Whether sessions that requests wait for are on their way from the store."""
        return bool(self._arrivals)

    # --- starting, and giving back --------------------------------------------------------------

    def admit(self, group: Group) -> bool:
        """Start the request that `next` has named; False where memory or slots are in use.

        Raises:
            NotFoundError: its session was deleted while it waited.
            DamagedSessionError, ConflictError, StoreError: its session can't be read.
        """
        if group.session is not None and not group.session.ephemeral:
            self._check_session_lives(group)
        need = self._kv.need(group, self._weights.expects_to_judge(group))
        if not self._kv.has_room(group, need):
            return False
        if group.session is None and group.ttt.learns:
            group.session = self._sessions.create_ephemeral(group.id)
        if group.session is not None and not (
            self._arrivals.take_in(group.session) and self._sessions.acquire(group.session)
        ):
            return False
        self._queue(group).take(group)
        try:
            self._kv.reserve(group, need)
            self._factory.begin(group, may_judge=self._weights.may_judge(group))
        except Exception:
            self.release(group)
            raise
        return True

    def _queue(self, group: Group) -> FairQueue:
        return self._adapts if group.is_adapt else self._completions

    def _check_session_lives(self, group: Group) -> None:
        session = group.session
        if session is None or session.ephemeral:
            return
        if not self._sessions.has(session):
            self._arrivals.forget(session)
            group.session = None
            raise NotFoundError("ttt.session", f"session {session.id!r} was deleted meanwhile")

    def release(self, group: Group) -> None:
        """Give back what the request held."""
        self._kv.release(group)
        group.sequences, group.rival = [], None
        if group.session is not None:
            self._sessions.release(group.session)


def _adapting_by_tenant(running: Iterable[Group]) -> Counter[str | None]:
    return Counter(group.request.tenant.id for group in running if group.is_adapt)


def _sequences(request: Request) -> int:
    return request.sampling.n if isinstance(request, GenerateRequest) else 1
