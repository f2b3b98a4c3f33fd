"""Which phase runs next: bookkeeping only, no tensors.

Every phase is bounded. While sequences decode, a prefill or write phase is small, and after each
the decoders get their share of the time before the next one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ponderttt.engine.config import EngineConfig
from ponderttt.engine.observer import PhaseKind
from ponderttt.engine.sequence import Group, PendingWrite, Sequence, Status

# Prefills may pass over waiting writes this often, to fill the batch of the next write.
_PATIENCE = 2

# Adapt requests may be passed over this often in favour of completions that have text to read or
# to learn; then a phase is theirs.
_ADAPT_PATIENCE = 3

# Rows of a prompt below which a piece is not worth a phase.
_LEAST_PIECE = 64


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Read these many further tokens of each sequence; all of them replay, or none does."""

    pieces: tuple[tuple[Sequence, int], ...]


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One token for each sequence."""

    sequences: tuple[Sequence, ...]


@dataclass(frozen=True, slots=True)
class WritePlan:
    """One gradient step of each group's write."""

    groups: tuple[Group, ...]


Plan = PrefillPlan | DecodePlan | WritePlan


class Scheduler:
    """Decides on the next phase from the groups that are running.

    Args:
        config: limits and shares.
        spares_others: background phases wait for texts that are drawn elsewhere, too: on a CPU,
            "elsewhere" are the same cores.
    """

    def __init__(self, config: EngineConfig, *, spares_others: bool = True) -> None:
        self._config = config
        self._spares_others = spares_others
        self._owed_to_decode = 0.0
        self._writes_passed_over = 0
        self._adapts_passed_over = 0
        self._replayed = False

    def next(self, groups: Iterable[Group]) -> Plan | None:
        """The next phase, or None where there is nothing to do.

        Background learning runs only when no interactive request has anything to do.
        """
        groups = list(groups)
        # A background write that has begun holds its session; let it finish first.
        plan = self._plan([g for g in groups if not g.background or _has_begun(g.write)])
        if plan is not None or (self._spares_others and any(map(_is_drawn_elsewhere, groups))):
            return plan
        return self._plan(
            _oldest_of_each_session(g for g in groups if g.background), background=True
        )

    def account(self, kind: PhaseKind, seconds: float) -> None:
        """Note how long a phase took, so that the shares come out right."""
        share = self._config.decode_share
        if kind == "decode":
            self._owed_to_decode = max(self._owed_to_decode - seconds, 0.0)
        else:
            self._owed_to_decode = seconds * share / (1.0 - share)

    def _plan(self, groups: list[Group], *, background: bool = False) -> Plan | None:
        free = [s for g in groups if g.write is None for s in g.sequences]
        decoding = tuple(s for s in free if s.status is Status.DECODE)
        # Tokens that somebody else draws are passed on between phases.
        generating = bool(decoding) or any(s.status is Status.REMOTE for s in free)
        if decoding and (self._owed_to_decode > 0.0 or not any(map(_has_text, groups))):
            return DecodePlan(decoding)
        groups = self._without_adapts(groups)
        prefilling, writing = _readable(groups), _writable(groups)
        # A request that arrives in idle time waits for the phase that runs; keep it short.
        small = generating or background
        room = self._config.busy_batch_tokens if small else self._config.max_batch_tokens
        if writing and (not prefilling or self._writes_passed_over >= _PATIENCE):
            self._writes_passed_over = 0
            return _fill_writes(writing, room)
        if prefilling:
            self._writes_passed_over += bool(writing)
            return self._fill_prefill(prefilling, room)
        return None

    def _without_adapts(self, groups: list[Group]) -> list[Group]:
        """Who may read or learn next: adapt requests give way to completions, but not for ever."""
        adapting = [g for g in groups if g.is_adapt and _has_text(g)]
        waited_for = any(not g.is_adapt and _has_text(g) for g in groups)
        if not (adapting and waited_for):
            self._adapts_passed_over = 0
            return groups
        turn_of_adapts = self._adapts_passed_over >= _ADAPT_PATIENCE
        self._adapts_passed_over = 0 if turn_of_adapts else self._adapts_passed_over + 1
        chosen = [g for g in groups if g.is_adapt is turn_of_adapts]
        # An update that has begun holds its session; who wants to learn there lets it finish.
        wanted = {g.session for g in chosen if g.write is not None}
        return chosen + [
            g
            for g in groups
            if g.is_adapt is not turn_of_adapts and _has_begun(g.write) and g.session in wanted
        ]

    def _fill_prefill(self, sequences: list[Sequence], room: int) -> PrefillPlan:
        replays = sequences[0].replays
        if any(sequence.replays is not replays for sequence in sequences):
            # In turn: a prompt of which much is known must not wait for the end of a long new one.
            replays = not self._replayed
        self._replayed = replays
        alike = [sequence for sequence in sequences if sequence.replays is replays]
        # An equal part each, so that a short prompt does not wait for a long one's end.
        part = max(room // len(alike), _LEAST_PIECE)
        pieces = []
        for sequence in alike:
            if room <= 0:
                break
            count = min(sequence.prefill_end - sequence.computed, part, room)
            pieces.append((sequence, count))
            room -= count
        return PrefillPlan(tuple(pieces))


def _readable(groups: Iterable[Group]) -> list[Sequence]:
    """Sequences with text to read whose request does not wait for an update.

    A rival does not wait: it reads the base model's weights.
    """
    return [
        s
        for g in groups
        for s in g.readers
        if s.status is Status.PREFILL and (g.write is None or s is g.rival)
    ]


def _has_text(group: Group) -> bool:
    """Whether the request has something to read or to learn."""
    return group.write is not None or any(s.status is Status.PREFILL for s in group.readers)


def _oldest_of_each_session(groups: Iterable[Group]) -> list[Group]:
    """In the background a session learns one answer after the other."""
    oldest: dict[str, Group] = {}
    for group in groups:
        if group.session is not None:
            oldest.setdefault(group.session.owner, group)
    return list(oldest.values())


def _is_drawn_elsewhere(group: Group) -> bool:
    return any(sequence.status is Status.REMOTE for sequence in group.sequences)


def _writable(groups: list[Group]) -> list[Group]:
    """Groups whose write may step now: one a session; those that have begun, then the oldest."""
    waiting = [(g.write, g) for g in groups if g.write is not None]
    waiting.sort(key=lambda pair: (not _has_begun(pair[0]), pair[0].decided))
    return _oldest_of_each_session(group for _, group in waiting)


def _has_begun(pending: PendingWrite | None) -> bool:
    return pending is not None and pending.write is not None


def _fill_writes(groups: list[Group], room: int) -> WritePlan:
    chosen: list[Group] = []
    for group in groups:
        rows = group.write.rows if group.write is not None else 0
        if chosen and rows > room:
            break
        chosen.append(group)
        room -= rows
    return WritePlan(tuple(chosen))
