"""Lives of requests: they are taken from the queue, go on from text to text, and end."""

from __future__ import annotations

import logging
import time

from ponderttt.engine.admission import Admission
from ponderttt.engine.background import background_group
from ponderttt.engine.config import EngineConfig
from ponderttt.engine.observer import EngineObserver, NullObserver
from ponderttt.engine.outputs import DoneEvent, ErrorEvent
from ponderttt.engine.prefix_reuse import PrefixReuse
from ponderttt.engine.relay import Relay
from ponderttt.engine.report import ttt_report
from ponderttt.engine.sequence import Group, Status
from ponderttt.engine.sequence_factory import SequenceFactory
from ponderttt.errors import PonderError
from ponderttt.sessions.manager import SessionManager

_LOG = logging.getLogger(__name__)


class Lifecycle:
    """Has requests begin, go on and end, and tells their callers and the observer how they end.

    Args:
        admission, factory, sessions, prefixes: the engine's.
        config: its limits.
        relay: to whoever draws the tokens elsewhere; None: they are drawn here.

    `running` are the requests that have begun, in the order in which they may read next.
    """

    def __init__(
        self,
        admission: Admission,
        factory: SequenceFactory,
        sessions: SessionManager,
        prefixes: PrefixReuse,
        config: EngineConfig,
        relay: Relay | None,
    ) -> None:
        self._admission = admission
        self._factory = factory
        self._sessions = sessions
        self._prefixes = prefixes
        self._config = config
        self._relay = relay
        self.observer: EngineObserver = NullObserver()
        self.running: list[Group] = []

    # --- beginning ---------------------------------------------------------------------------

    def admit(self) -> None:
        """Start the requests that there is room for; refuse those that have waited too long."""
        for group, reason in self._admission.overdue():
            self._refuse(group, reason)
        while (candidate := self._admission.next(self.running)) is not None:
            try:
                if not self._admission.admit(candidate):
                    return
            except Exception as error:  # its session can't be had, or there is no memory for it
                if not isinstance(error, PonderError):
                    _LOG.exception("request %s cannot start", candidate.id)
                self._refuse(candidate, error)
                continue
            self.running.append(candidate)

    def _refuse(self, group: Group, error: Exception) -> None:
        """End a request that has not begun."""
        self._admission.forget(group)
        group.sink(ErrorEvent(error))
        self._note_end(group, "error")

    # --- going on ----------------------------------------------------------------------------

    def advance(self, group: Group) -> None:
        """Take the request on to its next window, or to its end, if it is there.

        A request for which that fails ends with the error.
        """
        try:
            self._advance(group)
        except Exception as error:  # it concerns this request alone
            _LOG.exception("request %s cannot go on", group.id)
            self.fail(group, error)

    def _advance(self, group: Group) -> None:
        if group not in self.running or group.write is not None:
            return
        if group.is_adapt or group.background:
            sequence = group.sequences[0]
            if sequence.computed < sequence.prompt_len or sequence.spans:
                return
            if group.windows:
                if self._admission.pause(group, self.running):
                    self.running.remove(group)
                    return
                # Behind those who came meanwhile, or a long document would make them starve.
                self.running.remove(group)
                self.running.append(group)
                self._factory.next_window(group)
                return
        elif not all(s.status is Status.FINISHED for s in group.sequences):
            return
        self._complete(group)

    def _complete(self, group: Group) -> None:
        if group.background:
            self.retire(group, None)
            return
        successor = self._background(group)
        pending = len(successor.sequences[0].spans) if successor is not None else 0
        report = ttt_report(group, pending)
        tokens = group.prompt_tokens, group.generated_tokens
        # Of a text that is learned as it grows, generated tokens may be found there as well.
        cached = min(group.cached_tokens, group.prompt_tokens)
        if group.choice is not None:
            self.observer.chosen(group.choice)
        # The last that may fail while the request runs: a caller hears of one end, not of two.
        group.sink(DoneEvent(*tokens, report, cached))
        for sequence in group.sequences:
            self._prefixes.keep(sequence)
        if successor is not None:
            self._follow(successor)
        reason = group.sequences[0].finish_reason
        self.retire(group, "adapted" if reason is None else reason)

    def _follow(self, successor: Group) -> None:
        """Have a request that was answered learn on; it still holds its session's slot."""
        if successor.session is not None:
            self._sessions.acquire(successor.session)
        self.running.append(successor)

    def _background(self, group: Group) -> Group | None:
        """What the request is to learn once it is answered; holds nothing yet."""
        waiting = sum(g.background for g in self.running)
        if waiting >= self._config.max_num_seqs:
            _LOG.warning("%d answers are still to be learned; not adding another", waiting)
            return None
        return background_group(group, self._factory.equip)

    # --- ends --------------------------------------------------------------------------------

    def abort(self, request_id: str) -> None:
        """Forget a request; an update of it that is not committed is dropped."""
        for group in self._admission.queued():
            if group.id == request_id:
                self._admission.forget(group)
                self._note_end(group, "abort")
        for group in list(self.running):
            if group.id == request_id and not group.background:
                # Who types on asks for nearly the same again.
                for sequence in group.sequences:
                    self._prefixes.keep(sequence)
                self.retire(group, "abort")

    def abort_all(self, error: Exception) -> None:
        """End every request with an error."""
        for group in self._admission.queued():
            self._refuse(group, error)
        for group in list(self.running):
            try:
                self.fail(group, error)
            except Exception:  # whatever state the engine is in, everybody gets an answer
                _LOG.exception("request %s could not be cleaned up", group.id)

    def fail(self, group: Group, error: Exception) -> None:
        """End a request with an error, unless it has ended."""
        if group not in self.running:
            return
        group.sink(ErrorEvent(error))
        # A request that was answered has been counted.
        self.retire(group, None if group.background else "error")

    def retire(self, group: Group, outcome: str | None) -> None:
        """Give back what a running request holds; its caller has been told, or is gone.

        Whatever becomes of what runs elsewhere, nothing stays taken here.

        Args:
            group: the request.
            outcome: as the observer hears of it; None: it has heard, when the answer was given.
        """
        self.running.remove(group)
        generated = group.generated_tokens
        try:
            if self._relay is not None:
                self._relay.retire(group)
        except Exception:  # there is nobody left to tell, and the others go on
            _LOG.exception("request %s could not be retired elsewhere", group.id)
        finally:
            self._admission.release(group)
        if outcome is not None:
            self._note_end(group, outcome, generated)

    def _note_end(self, group: Group, outcome: str, generated: int = 0) -> None:
        seconds = time.monotonic() - group.request.arrival
        self.observer.finished(outcome, group.prompt_tokens, generated, seconds)
