"""What both environments share: whose turn it is, under which budget, and what it has spent.

Budgets are kept by the session's own ledger, and the four history features come from the
session's own history, so a policy is trained under the rules that it will be served under.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ponderttt.adaptation.actions import Action, CostModel, CostModelName
from ponderttt.adaptation.features import FEATURE_NAMES
from ponderttt.adaptation.features.history import HISTORY
from ponderttt.adaptation.gates import within_budget
from ponderttt.adaptation.params import TTTParams, check_budget
from ponderttt.errors import InvalidRequestError
from ponderttt.sessions.session import Session

_HISTORY_AT = FEATURE_NAMES.index(HISTORY.names[0])
HISTORY_COLUMNS = slice(_HISTORY_AT, _HISTORY_AT + len(HISTORY.names))


@dataclass(frozen=True, slots=True)
class BudgetRules:
    """Under which budgets episodes are run.

    Args:
        budgets: K mean costs, × forward; each episode is run under one of them, drawn evenly.
        costs: cost models by name.
        cost_model: the one in which budgets are counted.
        enforced: the ledger takes away what the budget does not pay for, as in serving. Without
            it, the multiplier alone holds a policy to its budget.
    Raises:
        InvalidRequestError: no budget, one out of range, or an unknown cost model.
    """

    budgets: tuple[float, ...]
    costs: Mapping[str, CostModel]
    cost_model: CostModelName = "nominal"
    enforced: bool = True

    def __post_init__(self) -> None:
        if not self.budgets or len(set(self.budgets)) < len(self.budgets):
            raise InvalidRequestError("budgets", f"{self.budgets}: give one or more, all different")
        for budget in self.budgets:
            check_budget("budgets", budget)
        if self.cost_model not in self.costs:
            raise InvalidRequestError(
                "cost_model", f"{self.cost_model!r} is not one of {', '.join(self.costs)}"
            )

    def allowed(self, session: Session, budget: float, ahead: int) -> Tensor:
        """[4] bool: what may be done with a chunk that `ahead` more are sure to follow."""
        permitted = self._permitted(session, budget, ahead)
        return torch.tensor([action in permitted for action in Action])

    def cut(self, action: Action, session: Session, budget: float, ahead: int) -> Action:
        """What serving would make of an action that the budget does not pay for."""
        return within_budget(action, self._permitted(session, budget, ahead))

    def _permitted(self, session: Session, budget: float, ahead: int) -> frozenset[Action]:
        if not self.enforced:
            return frozenset(Action)
        return session.ledger.allowed(self.costs[self.cost_model], budget, ahead)

    def history(self, session: Session, budget: float, ahead: int) -> list[float]:
        """The four history features."""
        credit = session.ledger.credit(self.costs[self.cost_model], budget)
        history = session.history(budget, credit, ahead)
        return [feature(history) for feature in HISTORY.features]

    def cost(self, action: Action) -> float:
        """× forward."""
        return self.costs[self.cost_model][action]

    def charge(self, session: Session, action: Action, loss: float | None) -> None:
        """Enter one chunk."""
        session.ledger.charge(action, self.costs, 0.0)
        session.record(loss, self.costs["nominal"][action])


def bookkeeping_session(name: str) -> Session:
    """A session without fast weights, for its ledger and averages."""
    return Session(name, TTTParams(), ephemeral=True, state=None)


def draw(generator: torch.Generator, count: int) -> int:
    """A number in 0 … count-1."""
    return int(torch.randint(count, (1,), generator=generator))


class ShuffledDeck:
    """Deals 0 … size-1 in random order, again and again; every card comes up equally often.

    Args:
        size: number of cards.
        generator: shuffles.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self._size = size
        self._generator = generator
        self.waiting: list[int] = []

    def deal(self) -> int:
        """The next card."""
        if not self.waiting:
            order = torch.randperm(self._size, generator=self._generator)
            self.waiting = [int(card) for card in order]
        return self.waiting.pop()


def as_actions(actions: Tensor, count: int) -> Sequence[Action]:
    """[N] int64 → actions; InvalidRequestError for another shape, or an action there is not."""
    if actions.shape != (count,):
        raise InvalidRequestError("actions", f"shape {tuple(actions.shape)}; must be ({count},)")
    if odd := sorted(set(actions.tolist()) - set(Action)):
        raise InvalidRequestError("actions", f"{odd[0]} lies outside [0, {len(Action) - 1}]")
    return [Action(int(action)) for action in actions]


def digest_of(parts: Iterable[bytes]) -> str:
    """Names what episodes are made of, so that a state is not continued on others."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def check_digest(kept: object, mine: str) -> None:
    """InvalidRequestError unless a state was made with these very episodes."""
    if kept != mine:
        raise InvalidRequestError(
            "episodes", "are not those that the run was begun with; give the same text or traces"
        )
