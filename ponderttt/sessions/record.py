"""`session.json`: what is known of a stored session beside its tensors, and the proof of them.

The file is written last: it names every other file of its version with length and SHA-256, so
where it is whole, the version is whole. It is kept in one canonical spelling and holds a checksum
of itself, so that no byte of it can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ponderttt.adaptation.actions import Action, CostModelName
from ponderttt.adaptation.gates import ThresholdState
from ponderttt.adaptation.ledger import WINDOW, Account, Ledger
from ponderttt.adaptation.params import AdaptOn, GateName, Read, TTTParams, When
from ponderttt.sessions.session import MAX_LEARNED, Session

RECORD_FILE = "session.json"
FORMAT = 1

_CHECKSUM = "checksum"
_LEAST_CHARS, _MOST_CHARS = 1, 64

_Count = Annotated[int, Field(ge=0, lt=1 << 53)]
_Amount = Annotated[float, Field(ge=0)]
_ChunkKey = Annotated[str, Field(min_length=_LEAST_CHARS, max_length=_MOST_CHARS)]
_ActionName = Literal["SKIP", "UPDATE_1", "UPDATE_2", "UPDATE_4"]


class RecordError(ValueError):
    """A `session.json` that is damaged, or not one of ours."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class AccountRecord(_Strict):
    """Of one cost model; see `Account`."""

    chunks: _Count
    total: _Amount
    recent: Annotated[list[_Amount], Field(max_length=WINDOW - 1)]


class LedgerRecord(_Strict):
    """See `Ledger`."""

    accounts: dict[CostModelName, AccountRecord]
    chunks: _Count
    totals: dict[CostModelName, _Amount]
    seconds: _Amount
    chunks_by_action: dict[_ActionName, _Count]


class ThresholdRecord(_Strict):
    """See `ThresholdState`."""

    chunks: _Count
    mean: float
    spread: float
    offset: float


class DefaultsRecord(_Strict):
    """See `TTTParams`; the session itself is left out."""

    gate: GateName | None
    action: _ActionName | None
    budget: float | None
    cost_model: CostModelName | None
    chunk_size: int | None
    adapt_on: AdaptOn | None
    when: When | None
    # Sessions stored by earlier versions have none.
    read: Read | None = None
    seed: int | None


class LayoutRecord(_Strict):
    """Which projections the fast weights belong to; another layout is another vector.

    Args:
        first_layer, last_layer: half-open range of the adaptive blocks.
        modules: adapted in each.
        size: numbers in the vector, P.
        seed: of the fresh weights.
    """

    rank: int
    alpha: float
    first_layer: int
    last_layer: int
    modules: list[str]
    size: int
    seed: int


class StoredFile(_Strict):
    """A file as it was written."""

    bytes: _Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Facts(_Strict):
    """Everything about a session but its tensors.

    Args:
        format: of this file.
        id: the session's name.
        owner: id of the API key that made it, if any.
        version: of the fast weights.
        model: that they adapt.
        layout: of the vector.
        created, last_used: Unix times.
        defaults, ledger, threshold: the session's.
        loss_ema, cost_ema, chunks, learned_tokens, rollbacks: the session's.
        learned: keys of the chunks it remembers, oldest first.
        pinned: versions that are kept as snapshots.
        files: the version's other files.
    """

    format: Literal[1]
    id: str
    owner: str | None
    version: _Count
    model: str
    layout: LayoutRecord
    created: _Amount
    last_used: _Amount
    defaults: DefaultsRecord
    ledger: LedgerRecord
    threshold: ThresholdRecord
    loss_ema: float
    cost_ema: float
    chunks: _Count
    learned_tokens: _Count
    rollbacks: _Count
    learned: Annotated[list[_ChunkKey], Field(max_length=MAX_LEARNED)]
    pinned: list[_Count]
    files: dict[str, StoredFile]

    def to_json(self) -> bytes:
        """The file's contents."""
        return _spell(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, text: bytes) -> Facts:
        """Read the file's contents.

        Raises:
            RecordError: a byte has changed, or a field is missing, unknown or out of range.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{RECORD_FILE} is not JSON: {error}") from error
        if not isinstance(content, dict) or content.pop(_CHECKSUM, None) is None:
            raise RecordError(f"{RECORD_FILE} has no checksum")
        if content.get("format") != FORMAT:
            raise RecordError(
                f"{RECORD_FILE} has format {content.get('format')!r}; this version reads {FORMAT}"
            )
        try:
            intact = _spell(content) == text
        except ValueError as error:  # numbers that JSON can't spell
            raise RecordError(f"{RECORD_FILE}: {error}") from error
        if not intact:
            raise RecordError(f"{RECORD_FILE} does not match its checksum")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(map(str, problem["loc"]))
            raise RecordError(f"{RECORD_FILE}: {field}: {problem['msg']}") from error


def _spell(content: dict[str, Any]) -> bytes:
    """The one spelling of a record: keys sorted, no spaces, and the checksum of the rest."""
    checksum = hashlib.sha256(_dump(content)).hexdigest()
    return _dump({**content, _CHECKSUM: checksum}) + b"\n"


def _dump(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def facts_of(session: Session, model: str, layout: LayoutRecord) -> Facts:
    """What is to be stored of a session; `files` are filled in when they are written."""
    ledger, threshold, defaults = session.ledger, session.threshold, session.defaults
    # Built from our own values, which need no checking; the copies are what costs time here.
    return Facts.model_construct(
        format=FORMAT,
        id=session.owner,
        owner=session.key_id,
        version=session.version,
        model=model,
        layout=layout,
        created=session.created,
        last_used=session.last_used,
        defaults=DefaultsRecord(
            gate=defaults.gate,
            action=None if defaults.action is None else _name(defaults.action),
            budget=None if defaults.budget is None else float(defaults.budget),
            cost_model=defaults.cost_model,
            chunk_size=defaults.chunk_size,
            adapt_on=defaults.adapt_on,
            when=defaults.when,
            read=defaults.read,
            seed=defaults.seed,
        ),
        ledger=LedgerRecord.model_construct(
            accounts={
                name: AccountRecord.model_construct(
                    chunks=account.chunks, total=account.total, recent=list(account.recent)
                )
                for name, account in ledger.accounts.items()
            },
            chunks=ledger.chunks,
            totals=dict(ledger.totals),
            seconds=ledger.seconds,
            chunks_by_action=dict(ledger.chunks_by_action),
        ),
        threshold=ThresholdRecord.model_construct(
            chunks=threshold.chunks,
            mean=threshold.mean,
            spread=threshold.spread,
            offset=threshold.offset,
        ),
        loss_ema=session.loss_ema,
        cost_ema=session.cost_ema,
        chunks=session.chunks,
        learned_tokens=session.learned_tokens,
        rollbacks=session.rollbacks,
        learned=list(session.learned),
        pinned=list(session.pinned),
        files={},
    )


def _name(action: Action) -> Any:
    return action.name


def apply_facts(session: Session, facts: Facts) -> None:
    """Make a session what its record says; its fast weights are not touched."""
    apply_learning(session, facts)
    session.version = facts.version
    session.created, session.last_used = facts.created, facts.last_used
    session.defaults = _defaults(facts.defaults)
    session.ledger = _ledger(facts.ledger)
    session.chunks = facts.chunks
    session.rollbacks = facts.rollbacks
    session.pinned = list(facts.pinned)


def apply_learning(session: Session, facts: Facts) -> None:
    """Take back what goes with the weights: chunks learned, threshold and moving averages."""
    threshold = facts.threshold
    session.threshold = ThresholdState(
        threshold.chunks, threshold.mean, threshold.spread, threshold.offset
    )
    session.learned.clear()
    session.learned.update(dict.fromkeys(facts.learned))
    session.learned_tokens = facts.learned_tokens
    session.loss_ema, session.cost_ema = facts.loss_ema, facts.cost_ema


def _defaults(record: DefaultsRecord) -> TTTParams:
    return TTTParams(
        # `when` of a session's requests may be `background`; the name itself plays no part.
        session="any" if record.when == "background" else None,
        gate=record.gate,
        action=None if record.action is None else Action[record.action],
        budget=record.budget,
        cost_model=record.cost_model,
        chunk_size=record.chunk_size,
        adapt_on=record.adapt_on,
        when=record.when,
        read=record.read,
        seed=record.seed,
    )


def _ledger(record: LedgerRecord) -> Ledger:
    ledger = Ledger(chunks=record.chunks, seconds=record.seconds)
    for name, stored in record.accounts.items():
        account = Account(stored.chunks, stored.total)
        account.recent.extend(stored.recent)
        ledger.accounts[name] = account
    ledger.totals.update({str(name): total for name, total in record.totals.items()})
    ledger.chunks_by_action.update({str(k): n for k, n in record.chunks_by_action.items()})
    return ledger
