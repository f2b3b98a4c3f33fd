"""A session: one client's fast weights and what has happened to them."""

from __future__ import annotations

import re
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.gates import ThresholdState
from ponderttt.adaptation.ledger import Ledger
from ponderttt.adaptation.observation import History
from ponderttt.adaptation.params import TTTParams
from ponderttt.errors import InvalidRequestError
from ponderttt.fast_weights.bank import BASE_SLOT, AdapterState

#: Between the id of the API key that a session belongs to and the name that its owner gave it.
KEY_SEPARATOR = "~"

KEY_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

#: Chunks that a session remembers having learned; the oldest are forgotten first.
MAX_LEARNED = 65536

_EMA = 0.9


def qualified_name(key_id: str | None, name: str) -> str:
    """A session's name in the engine: those of two API keys never meet."""
    return name if key_id is None else f"{key_id}{KEY_SEPARATOR}{name}"


def plain_name(qualified: str) -> str:
    """The name that the session's owner gave it."""
    return qualified.partition(KEY_SEPARATOR)[2] if KEY_SEPARATOR in qualified else qualified


def key_id_of(qualified: str) -> str | None:
    """Id of the API key that a session belongs to; None: of nobody in particular."""
    return qualified.partition(KEY_SEPARATOR)[0] if KEY_SEPARATOR in qualified else None


def new_session_id() -> str:
    """A random name."""
    return f"session-{uuid.uuid4().hex[:12]}"


def check_session_id(param: str, name: str) -> None:
    """Raise InvalidRequestError unless a name is valid; it may be qualified by a key's id."""
    key_id = key_id_of(name)
    if key_id is not None and not KEY_ID.fullmatch(key_id):
        raise InvalidRequestError(param, f"{key_id[:64]!r} is not the id of an API key")
    check_plain_name(param, plain_name(name))


def check_plain_name(param: str, name: str) -> None:
    """Raise InvalidRequestError unless `name` is 1–128 of letters, digits, `.`, `_`, `-`."""
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(
            param,
            f"{name[:140]!r} is not a session id; use 1 to 128 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit",
        )


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

    @property
    def updates(self) -> int:
        """Chunks on which at least one step was taken and kept."""
        by_action = self.ledger.chunks_by_action
        return sum(n for name, n in by_action.items() if name != Action.SKIP.name)


def _ema(old: float, new: float) -> float:
    return _EMA * old + (1 - _EMA) * new
