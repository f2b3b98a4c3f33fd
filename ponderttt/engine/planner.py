"""Plans phases over what is left to read: what is known already is taken over first."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ponderttt.engine.lifecycle import Lifecycle
from ponderttt.engine.prefix_reuse import PrefixReuse
from ponderttt.engine.scheduler import Plan, PrefillPlan, Scheduler
from ponderttt.engine.sequence import Sequence, Status
from ponderttt.engine.weights_selector import WeightsSelector

_LOG = logging.getLogger(__name__)


class Planner:
    """Between the scheduler, which counts what is to be read, and the prefix cache, which knows it.

    Args:
        scheduler, prefixes, weights, lifecycle: the engine's.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        prefixes: PrefixReuse,
        weights: WeightsSelector,
        lifecycle: Lifecycle,
    ) -> None:
        self._scheduler = scheduler
        self._prefixes = prefixes
        self._weights = weights
        self._lifecycle = lifecycle

    def next(self) -> Plan | None:
        """The next phase; where it would read what is known, that is taken over first.

        A request for which that fails ends with the error.
        """
        for group in list(self._lifecycle.running):
            for sequence in group.sequences:
                if sequence.chain is None and sequence.status is Status.PREFILL:
                    self._reuse(sequence, self._prefixes.look_up)
        while True:
            plan = self._scheduler.next(self._lifecycle.running)
            if not isinstance(plan, PrefillPlan):
                return plan
            reused = [self._reuse(s, self._prefixes.reuse) for s, _ in plan.pieces]
            if not any(reused):
                return plan

    def _reuse(self, sequence: Sequence, take: Callable[[Sequence], bool]) -> bool:
        try:
            if not sequence.group.is_adapt:
                # Before anything is taken over: whose weights a prompt reads depends on it.
                self._weights.note_version(sequence.group)
            reused = take(sequence)
            if sequence.computed:
                self._weights.note_version(sequence.group)
        except Exception as error:  # it concerns this request alone
            _LOG.exception("request %s cannot start", sequence.group.id)
            self._lifecycle.fail(sequence.group, error)
            return True
        return reused
