"""The ledger: what learning has cost a session, and what its budget still allows."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from ponderttt.adaptation.actions import Action, CostModel

#: Chunks over which a budget holds wherever one looks, not just from the session's start.
WINDOW = 64

# Sums of a few thousand exact costs; a request for exactly the budget must not fail by rounding.
_SLACK = 1e-9


@dataclass(slots=True)
class Account:
    """Costs, in one cost model and × forward, of the chunks that were gated under a budget.

    The budget B holds in two senses: the mean over these chunks of a session is not above B when a
    request has run to its end (one that is cut off leaves a debt, which the next chunks pay), and
    no 64 of them in a row cost more than 64·B. Chunks without a budget neither earn nor owe.
    """

    chunks: int = 0
    total: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW - 1))

    def allows(self, cost: float, budget: float, ahead: int, skip_cost: float = 1.0) -> bool:
        """Whether a chunk may cost this much.

        Args:
            cost: of the action in question, × forward.
            budget: highest mean cost, × forward.
            ahead: chunks of the same request that still follow and can be skipped to make up for
                this one, so that learning may come early, where it helps most.
            skip_cost: of a chunk that is skipped.
        """
        mean_holds = (
            self.total + cost + ahead * skip_cost <= budget * (self.chunks + 1 + ahead) + _SLACK
        )
        unfilled = WINDOW - 1 - len(self.recent)
        window_holds = sum(self.recent) + cost + unfilled * skip_cost <= budget * WINDOW + _SLACK
        return mean_holds and window_holds

    def charge(self, cost: float) -> None:
        """Add one chunk."""
        self.chunks += 1
        self.total += cost
        self.recent.append(cost)

    @property
    def mean(self) -> float:
        """Mean cost per chunk, × forward; 0 before the first chunk."""
        return self.total / self.chunks if self.chunks else 0.0


@dataclass(slots=True)
class Ledger:
    """Costs of a session's chunks in both cost models, and in seconds of this machine."""

    accounts: dict[str, Account] = field(
        default_factory=lambda: {"nominal": Account(), "measured": Account()}
    )
    chunks: int = 0
    totals: dict[str, float] = field(default_factory=lambda: {"nominal": 0.0, "measured": 0.0})
    seconds: float = 0.0
    chunks_by_action: dict[str, int] = field(
        default_factory=lambda: {action.name: 0 for action in Action}
    )

    def allowed(self, costs: CostModel, budget: float | None, ahead: int = 0) -> frozenset[Action]:
        """Actions that the budget permits now; SKIP always is."""
        if budget is None:
            return frozenset(Action)
        account = self.accounts[costs.name]
        permitted = {
            action
            for action in Action
            if account.allows(costs[action], budget, ahead, costs[Action.SKIP])
        }
        return frozenset(permitted | {Action.SKIP})

    def credit(self, costs: CostModel, budget: float | None) -> float:
        """Budget not spent since the session began, × forward; 0 where there is no budget."""
        if budget is None:
            return 0.0
        account = self.accounts[costs.name]
        return budget * account.chunks - account.total

    def mean(self, cost_model: str) -> float:
        """Mean cost of all chunks, × forward; 0 before the first."""
        return self.totals[cost_model] / self.chunks if self.chunks else 0.0

    def charge(
        self,
        action: Action,
        models: Mapping[str, CostModel],
        seconds: float,
        *,
        budgeted: bool = True,
    ) -> None:
        """Enter one chunk: its action in every cost model, and the seconds it took.

        Args:
            action: what was done.
            models: cost models by name.
            seconds: wall time.
            budgeted: the chunk was gated under a budget.
        """
        self.chunks += 1
        for name, account in self.accounts.items():
            cost = models[name][action]
            self.totals[name] += cost
            if budgeted:
                account.charge(cost)
        self.chunks_by_action[action.name] += 1
        self.seconds += seconds
