"""Where a session's fast weights are: in a slot of the bank, in RAM, or with the store alone."""

from __future__ import annotations

import torch

from ponderttt.fast_weights.bank import BASE_SLOT, AdapterBank, AdapterState
from ponderttt.sessions.session import Session


class SessionWeights:
    """Moves sessions' weights between the bank and RAM. In the engine's thread only.

    Cold sessions have to be fetched before: their weights are nowhere here. Those that have never
    learned have fresh ones, which take no room.

    Args:
        bank: of fast weights.
    """

    def __init__(self, bank: AdapterBank) -> None:
        self._bank = bank

    @property
    def has_room(self) -> bool:
        """Whether the bank has a free slot."""
        return self._bank.has_room

    def enter(self, session: Session) -> None:
        """From RAM into a free slot of the bank."""
        state = self._bank.fresh_state() if session.state is None else session.state
        session.slot = self._bank.allocate(session.owner, state, session.version)
        session.state = None

    def evict(self, session: Session) -> None:
        """From the session's slot of the bank into RAM."""
        state = self._bank.release(session.slot, session.owner)
        session.state = state.to(torch.device("cpu"))
        session.slot = BASE_SLOT

    def drop(self, session: Session) -> None:
        """Forget the weights, wherever they are."""
        session.state = None
        if session.slot != BASE_SLOT:
            self._bank.release(session.slot, session.owner)
            session.slot = BASE_SLOT

    def state(self, session: Session) -> AdapterState:
        """A copy of the fast weights and optimiser state, wherever they are."""
        if session.slot != BASE_SLOT:
            return self._bank.state(session.slot, session.owner)
        return self._bank.fresh_state() if session.state is None else session.state.clone()

    def digest(self, session: Session) -> str:
        """SHA-256 of the fast weights, in hexadecimal; taken once per version."""
        if session.digested is None or session.digested[0] != session.version:
            session.digested = session.version, self.state(session).digest()
        return session.digested[1]

    def fresh_digest(self) -> str:
        """The digest of weights that have learned nothing: they are the base model's."""
        return self._bank.fresh_state().digest()

    def norm(self, session: Session) -> float:
        """L2 distance of the fast weights from fresh ones."""
        weights = self.state(session).weights
        return float((weights - self._bank.fresh_weights.to(weights.device)).norm())
