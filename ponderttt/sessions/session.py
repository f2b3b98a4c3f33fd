"""A session: one client's fast weights and what has happened to them."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.gates import ThresholdState
from ponderttt.adaptation.ledger import Ledger
from ponderttt.adaptation.observation import History
from ponderttt.adaptation.params import TTTParams
from ponderttt.fast_weights.bank import BASE_SLOT, AdapterState
from ponderttt.sessions.names import check_session_id, key_id_of, plain_name

__all__ = ["MAX_LEARNED", "Session", "check_session_id"]

#: Chunks that a session remembers having learned; the oldest are forgotten first.
MAX_LEARNED = 65536

_EMA = 0.9


@dataclass(slots=True, eq=False)
class Session:
    """One owner of fast weights. Records state; never calls the engine.

    Args:
        owner: unique name in the bank; for a client's session its qualified name, for weights
            that live for one request `request:<id>`.
        defaults: what the session's requests ask of test-time training when they don't say.
        ephemeral: lives for one request only.
        state: the fast weights while they are not in the bank.
        slot: of the bank while they are.
        pins: requests that are using the slot now.
        version: of the fast weights; counts commits.
        pinned: versions that the store keeps as snapshots, oldest first.
        kept: versions that the store holds, ascending; the last is what a crash would leave.
        digested: version and digest of the fast weights, as they were last asked for.
        cold: the store alone holds the weights; they are fetched when somebody needs them.
    """

    owner: str
    defaults: TTTParams
    ephemeral: bool
    state: AdapterState | None
    slot: int = BASE_SLOT
    pins: int = 0
    version: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    threshold: ThresholdState = field(default_factory=ThresholdState)
    learned: OrderedDict[str, None] = field(default_factory=OrderedDict)
    loss_ema: float = 0.0
    cost_ema: float = 1.0
    chunks: int = 0
    learned_tokens: int = 0
    rollbacks: int = 0
    created: float = field(default_factory=time.time)
    last_used: float = field(default_factory=time.time)
    pinned: list[int] = field(default_factory=list)
    kept: tuple[int, ...] = ()
    digested: tuple[int, str] | None = None
    cold: bool = False

    @property
    def id(self) -> str | None:
        """The client's name for it; None where it lives for one request."""
        return None if self.ephemeral else plain_name(self.owner)

    @property
    def key_id(self) -> str | None:
        """Id of the API key that it belongs to; None: of nobody in particular."""
        return None if self.ephemeral else key_id_of(self.owner)

    def has_learned(self, chunk: str) -> bool:
        """Whether the chunk with this hash was learned before."""
        return chunk in self.learned

    def remember(self, chunk: str, tokens: int = 0) -> None:
        """Enter a learned chunk by one of its names; its tokens count once."""
        self.learned[chunk] = None
        self.learned_tokens += tokens
        if len(self.learned) > MAX_LEARNED:
            self.learned.popitem(last=False)

    def history(self, budget: float | None, credit: float, ahead: int) -> History:
        """What the features may know of the past."""
        return History(
            loss_ema=self.loss_ema,
            cost_ema=self.cost_ema,
            budget=12.0 if budget is None else budget,
            credit=credit,
            ahead=ahead,
        )

    def record(self, loss: float | None, nominal_cost: float) -> None:
        """Enter one chunk that was dealt with into the moving averages."""
        if loss is not None:
            # 0 until a chunk had a loss; a text of one token has none.
            self.loss_ema = _ema(self.loss_ema, loss) if self.loss_ema else loss
        self.cost_ema = _ema(self.cost_ema, nominal_cost)
        self.chunks += 1

    def fork(self, owner: str, state: AdapterState) -> Session:
        """A copy that goes its own way from here.

        Args:
            owner: its name.
            state: of its fast weights; it becomes the copy's own.
        """
        child = copy.copy(self)
        child.owner, child.state = owner, state
        child.slot, child.pins = BASE_SLOT, 0
        child.ledger = copy.deepcopy(self.ledger)
        child.threshold = copy.copy(self.threshold)
        child.learned = self.learned.copy()
        child.pinned, child.kept = [], ()
        child.created = child.last_used = time.time()
        return child

    @property
    def updates(self) -> int:
        """Chunks on which at least one step was taken and kept."""
        by_action = self.ledger.chunks_by_action
        return sum(n for name, n in by_action.items() if name != Action.SKIP.name)


def _ema(old: float, new: float) -> float:
    return _EMA * old + (1 - _EMA) * new
