"""Which test-time-training settings hold for a request: its own, its session's, the server's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from ponderttt.adaptation.actions import Action, CostModelName
from ponderttt.adaptation.params import AdaptOn, GateName, Read, TTTParams, When
from ponderttt.engine.config import TTTDefaults
from ponderttt.errors import InvalidRequestError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ResolvedTTT:
    """`TTTParams` with nothing left open; `budget` None means no limit (gate `fixed` only)."""

    gate: GateName
    action: Action
    budget: float | None
    cost_model: CostModelName
    chunk_size: int
    adapt_on: AdaptOn
    when: When
    read: Read
    seed: int

    @property
    def learns_prompt(self) -> bool:
        """Whether prompt chunks are gated."""
        return self.gate != "off" and self.adapt_on in ("prompt", "both")

    @property
    def learns_generated(self) -> bool:
        """Whether generated chunks are gated."""
        return self.gate != "off" and self.adapt_on in ("generated", "both")

    @property
    def learns(self) -> bool:
        """Whether any chunks are gated."""
        return self.learns_prompt or self.learns_generated


def resolve_ttt(
    request: TTTParams,
    session: TTTParams,
    defaults: TTTDefaults,
    default_gate: GateName,
    has_policy: bool,
) -> ResolvedTTT:
    """Merge the three levels; the request's fields win, then the session's.

    Raises:
        InvalidRequestError: gate `policy` without a policy.
    """
    gate = _gate(request) or _gate(session) or default_gate
    if gate == "policy" and not has_policy:
        raise InvalidRequestError(
            "ttt.gate",
            "'policy' needs a policy trained for this model, and none is loaded; "
            "use 'threshold', or start the server with --policy",
        )
    budget = session.budget if request.budget is None else request.budget
    if budget is None and gate != "fixed":
        budget = defaults.budget
    when: When = _first(request.when, session.when, defaults.when)
    if request.session is None:
        # Nobody would read weights that are learned after the only request that owns them.
        when = "inline"
    return ResolvedTTT(
        gate=gate,
        action=_first(request.action, session.action, defaults.action),
        budget=budget,
        cost_model=_first(request.cost_model, session.cost_model, defaults.cost_model),
        chunk_size=_first(request.chunk_size, session.chunk_size, defaults.chunk_size),
        adapt_on=_first(request.adapt_on, session.adapt_on, defaults.adapt_on),
        when=when,
        read=_first(request.read, session.read, defaults.read),
        seed=_first(request.seed, session.seed, 0),
    )


def for_documents(resolved: ResolvedTTT) -> ResolvedTTT:
    """The same for an adapt request: documents are learned as they are read."""
    return replace(resolved, adapt_on="prompt", when="inline")


def _gate(params: TTTParams) -> GateName | None:
    # Naming an action asks for the gate that takes one.
    return params.gate or ("fixed" if params.action is not None else None)


def _first(*values: T | None) -> T:
    return next(value for value in values if value is not None)
