"""The engine: admits requests, runs phase after phase, tells callers what happened.

Everything here but `prepare` runs in one thread. `Engine` and `AsyncEngine` are the fronts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path

import torch

from ponderttt.adaptation.actions import NOMINAL, CostModel
from ponderttt.adaptation.calibration import calibration_for
from ponderttt.adaptation.params import GateName
from ponderttt.adaptation.policy import PolicyGate, load_policy
from ponderttt.adaptation.rules import UpdateRule
from ponderttt.adaptation.update import Writer
from ponderttt.config import cache_dir
from ponderttt.engine.admission import Admission
from ponderttt.engine.background import background_group
from ponderttt.engine.choice import Choices
from ponderttt.engine.config import DEFAULT_MODEL_LEN, EngineConfig, served_name
from ponderttt.engine.costs import cached_costs, estimate_costs, measure_costs
from ponderttt.engine.emitter import Emitter
from ponderttt.engine.generator import AdapterCounts, Generator
from ponderttt.engine.learner import Learner
from ponderttt.engine.observer import EngineObserver, NullObserver, StepRecord
from ponderttt.engine.outputs import DoneEvent, ErrorEvent, Event
from ponderttt.engine.phases import Phases, groups_at_fault, groups_of
from ponderttt.engine.prefix_cache import PrefixCache, PrefixCounts
from ponderttt.engine.prefix_reuse import PrefixReuse
from ponderttt.engine.reader import Reader
from ponderttt.engine.relay import Relay
from ponderttt.engine.report import ttt_report
from ponderttt.engine.request import Request, Tenant
from ponderttt.engine.scheduler import Plan, PrefillPlan, Scheduler
from ponderttt.engine.sequence import Group, Sequence, Status
from ponderttt.errors import PonderError
from ponderttt.fast_weights.bank import AdapterBank
from ponderttt.fast_weights.layout import AdapterLayout
from ponderttt.fast_weights.peft_format import export_adapter
from ponderttt.models import store
from ponderttt.models.checkpoint import load_decoder, torch_device, torch_dtype
from ponderttt.models.decoder import Decoder
from ponderttt.models.tokenizer import Tokenizer
from ponderttt.models.transfer import settle
from ponderttt.sessions.codec import StateCodec
from ponderttt.sessions.files import open_files
from ponderttt.sessions.manager import SessionManager
from ponderttt.sessions.store import SessionStore
from ponderttt.sessions.vault import StoreStats

_LOG = logging.getLogger(__name__)

# How often to look whether a session has come from the store.
_LOOK_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts at one moment.

    `kv_*` in positions, `prefix_*` of the prefix cache, `store` of the session store, if there is
    one, `adapters` those that are loaded where somebody else generates.
    """

    running: int = 0
    waiting: int = 0
    background: int = 0
    kv_tokens: int = 0
    kv_capacity: int = 0
    bank_occupied: int = 0
    bank_capacity: int = 0
    sessions: int = 0
    evictions: int = 0
    prefix_trunk: PrefixCounts = field(default_factory=PrefixCounts)
    prefix_adaptive: PrefixCounts = field(default_factory=PrefixCounts)
    store: StoreStats | None = None
    adapters: AdapterCounts = field(default_factory=AdapterCounts)


class EngineCore:
    """One model, its bank of fast weights, and the requests that run on them.

    Args:
        model, tokenizer: what is served.
        model_name: as clients call it.
        config: limits and defaults.
        rule: what a gradient step is.
        policy: the trained gate, if there is one.
        generator: draws the tokens elsewhere; None: here. Closed with the engine.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        model_name: str,
        config: EngineConfig,
        rule: UpdateRule,
        policy: PolicyGate | None = None,
        generator: Generator | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.config = config
        self.policy = policy
        limit = config.max_model_len or min(model.config.max_positions, DEFAULT_MODEL_LEN)
        self.max_model_len = min(limit, model.config.max_positions, config.max_kv_tokens)
        layout = AdapterLayout(model, config.lora or calibration_for(model_name).lora)
        # Small steps vanish in half precision, whatever the model is kept in.
        self.bank = AdapterBank(layout, config.adapter_slots, model.device, torch.float32)
        self.sessions = SessionManager(self.bank, config.max_sessions)
        self.default_gate: GateName = config.ttt.gate or ("policy" if policy else "threshold")
        self.costs: dict[str, CostModel] = {
            "nominal": NOMINAL,
            "measured": estimate_costs(model, self.bank),
        }
        self.writer = Writer(model, self.bank, rule)
        self.reader = Reader(model, self.bank)
        self.prefixes = PrefixReuse(PrefixCache(config.prefix_cache_bytes), layout.first_layer)
        self._observer: EngineObserver = NullObserver()
        self._learner = Learner(
            model, self.bank, self.writer, tokenizer, self.costs, policy, self._observer
        )
        self._emitter = Emitter(tokenizer.eos_token_ids, self._observer)
        self._scheduler = Scheduler(config, spares_others=model.device.type == "cpu")
        choices = Choices()
        self._admission = Admission(
            model, tokenizer, self.sessions, self.reader, config,
            self.max_model_len, self.default_gate, policy is not None, choices,
            generator is not None,
        )  # fmt: skip
        self._phases = Phases(
            model, self.reader, self._learner, self._emitter, self._admission.fork_sequence,
            choices, remote=generator is not None,
        )  # fmt: skip
        self._relay: Relay | None = None
        if generator is not None:
            generator.on_published = lambda seconds: self._observer.published(seconds)
            self._relay = Relay(
                generator, self._emitter, self._learner, self.sessions, layout,
                tokenizer.eos_token_ids, model_name,
            )  # fmt: skip
        self._running: list[Group] = []
        self._close_guard = threading.Lock()
        self._closed = False
        self.sessions.on_reset = self.prefixes.cache.drop
        if config.store is not None:
            codec = StateCodec(layout, self.bank.fresh_weights, model_name, rule.max_norm)
            files = open_files(config.store.url)
            store = SessionStore(files, codec, config.store.keep_versions)
            self.sessions.attach(store, config.store)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        config: EngineConfig | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        policy: Path | None = None,
        observer: EngineObserver | None = None,
        generator: Generator | None = None,
        progress: bool = False,
    ) -> EngineCore:
        """Fetch (if need be) and load a model, its policy and its update rule.

        Args:
            model: embedded name, hub name or directory.
            config: None: the defaults.
            device, dtype: torch's names.
            policy: a policy directory; None: the one shipped for the model, if there is one.
            observer: hears of everything.
            generator: draws the tokens elsewhere; None: here.
            progress: show a bar where something is downloaded.
        Raises:
            ModelError: the model cannot be had, or not on this device, or not compiled.
            PolicyFormatError: the policy is damaged or for something else.
        """
        config = config or EngineConfig()
        path = store.resolve(model, progress=progress)
        name = served_name(model)
        decoder = load_decoder(
            path,
            torch_device(device),
            torch_dtype(dtype),
            packed=config.packed_weights,
            native=config.native_kernels,
            compiled=config.compile,
        )
        shipped = files("ponderttt") / "policies" / name
        if policy is None and shipped.is_dir():
            policy = Path(str(shipped))
        core = cls(
            decoder,
            Tokenizer.from_dir(path),
            name,
            config,
            config.rule or calibration_for(name).rule,
            load_policy(policy, name) if policy is not None else None,
            generator,
        )
        if config.measure_costs:
            core.measure_costs(config.ttt.chunk_size)
        if observer is not None:
            core.observer = observer
        return core

    def measure_costs(self, chunk_size: int) -> CostModel:
        """Time the actions on this machine, or recall earlier figures, and use them from now on."""
        layout = self.bank.layout
        key: dict[str, object] = {
            "model": self.model_name,
            "shape": [self.model.config.num_layers, self.model.config.hidden_size],
            "device": str(self.model.device),
            "dtype": str(self.model.dtype),
            "chunk_size": chunk_size,
            "lora": [layout.config.rank, layout.first_layer, layout.size],
            "optimizer": self.writer.rule.optimizer,
            "packed": self.model.head.packed_bytes > 0,
        }
        # Only where there are some, so that the figures of earlier starts stay known.
        if self.model.kernels is not None:
            key["kernels"] = self.model.kernels
        if self.model.compiled:
            key["compiled"] = True
        size = min(chunk_size, self.max_model_len)
        self.costs["measured"] = cached_costs(
            cache_dir() / "costs",
            key,
            lambda: measure_costs(self.model, self.bank, self.writer, size),
        )
        return self.costs["measured"]

    @property
    def observer(self) -> EngineObserver:
        """Who hears of steps, chunks and requests."""
        return self._observer

    @observer.setter
    def observer(self, observer: EngineObserver) -> None:
        self._observer = self._learner.observer = self._emitter.observer = observer

    def call_on_arrival(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, from any thread, when `step` has something to do once more."""
        if self._relay is not None:
            self._relay.generator.on_arrival = wake

    # --- requests ------------------------------------------------------------------------

    def prepare(self, request: Request, sink: Callable[[Event], None]) -> Group:
        """Check a request; from any thread. See `Admission.prepare` for the errors."""
        return self._admission.prepare(request, sink)

    def enqueue(self, group: Group) -> None:
        """Let a prepared request wait its turn; OverloadedError where the queue is full."""
        self._admission.enqueue(group)

    def abort(self, request_id: str) -> None:
        """Forget a request; an update of it that is not committed is dropped."""
        for group in self._admission.queued():
            if group.id == request_id:
                self._admission.forget(group)
                self._note_end(group, "abort")
        for group in list(self._running):
            if group.id == request_id and not group.background:
                # Who types on asks for nearly the same again.
                for sequence in group.sequences:
                    self._keep_prefix(sequence)
                self._retire(group, "abort")

    def abort_all(self, error: Exception) -> None:
        """End every request with an error."""
        for group in self._admission.queued():
            self._refuse(group, error)
        for group in list(self._running):
            try:
                self._fail(group, error)
            except Exception:  # whatever state the engine is in, everybody gets an answer
                _LOG.exception("request %s could not be cleaned up", group.id)

    def delete_session(self, name: str) -> Future[None] | None:
        """Forget a session, and what it was still to learn in the background.

        Returns:
            Done when nothing of it is stored any more; None where there is no store.
        Raises:
            NotFoundError: unknown.
            ConflictError: a request is using it, or another server.
        """
        if name in self.sessions.unreadable():
            return self.sessions.delete(name)
        session = self.sessions.get(name)
        learning = [g for g in self._running if g.background and g.session is session]
        # Where the session can't be deleted, it goes on learning.
        if len(learning) == session.pins:
            for group in learning:
                self._retire(group, None)
        deleted = self.sessions.delete(name)
        self.prefixes.cache.drop(session)
        if self._relay is not None:
            self._relay.generator.forget(name)
        return deleted

    def close(self, seconds: float = 60.0) -> None:
        """Stop what runs elsewhere, store all sessions and let go of them.

        Call it once no thread uses the engine any more.

        Args:
            seconds: limit for what the store takes.
        """
        with self._close_guard:
            if self._closed:
                return
            self._closed = True
            if self._relay is not None:
                self._relay.generator.close()
            unsaved = self.sessions.close(seconds)
        if unsaved:
            _LOG.error(
                "%d sessions could not be saved within %g s: %s",
                len(unsaved), seconds, ", ".join(unsaved),
            )  # fmt: skip

    def export_adapter(self, name: str, directory: Path) -> None:
        """Write a session's fast weights as a PEFT adapter directory."""
        state = self.sessions.state(self.sessions.get(name))
        export_adapter(self.bank.layout, state.weights, directory, self.model_name)

    @property
    def waiting(self) -> int:
        """Requests in the queue; from any thread."""
        return self._admission.waiting

    def check_room(self, tenant: Tenant, arriving: int = 0, arriving_of_tenant: int = 0) -> None:
        """Whether another request may wait; from any thread. See `Admission.check_room`."""
        self._admission.check_room(tenant, arriving, arriving_of_tenant)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something."""
        return bool(self._running or self._admission.waiting)

    @property
    def has_requests(self) -> bool:
        """Whether anybody waits for an answer (background learning not counted)."""
        return bool(self._admission.waiting) or any(not g.background for g in self._running)

    def next_due(self) -> float | None:
        """Seconds after which `step` is to be called though nothing has come; None: never."""
        due = self.sessions.next_due()
        if self._admission.awaits_sessions:
            return _LOOK_SECONDS if due is None else min(due, _LOOK_SECONDS)
        return due

    def stats(self) -> EngineStats:
        """Counts of this moment."""
        interactive = [g for g in self._running if not g.background]
        return EngineStats(
            running=sum(s.status is not Status.FINISHED for g in interactive for s in g.sequences),
            waiting=self._admission.waiting,
            background=len(self._running) - len(interactive),
            kv_tokens=self._admission.kv_reserved,
            kv_capacity=self.config.max_kv_tokens,
            bank_occupied=self.bank.occupied,
            bank_capacity=self.bank.capacity,
            sessions=len(self.sessions),
            evictions=self.sessions.evictions,
            prefix_trunk=replace(self.prefixes.cache.trunk_counts),
            prefix_adaptive=replace(self.prefixes.cache.adaptive_counts),
            store=self.sessions.store_stats(),
            adapters=self._relay.generator.counts() if self._relay else AdapterCounts(),
        )

    # --- phases --------------------------------------------------------------------------

    def step(self) -> bool:
        """Admit what fits and run one phase; False where there was nothing to do."""
        self.sessions.tick()
        self._admit()
        arrived = self._exchange()
        plan = self._next_plan()
        if plan is None:
            return arrived
        begun = time.perf_counter()
        try:
            for group in groups_of(plan):
                self._note_version(group)
            kind, tags, tokens = self._phases.run(plan)
            settle(self.model.device)
        except Exception as error:  # one request's trouble must not end the others
            _LOG.exception("a phase failed")
            for group in groups_at_fault(plan, error):
                self._fail(group, error)
            return True
        seconds = time.perf_counter() - begun
        for group, reason in self._phases.failed:
            _LOG.error("request %s failed", group.id, exc_info=reason)
            self._fail(group, reason)
        if isinstance(plan, PrefillPlan):
            # First tokens have gone out: those who wait for them need not wait for this.
            for sequence, _ in plan.pieces:
                if sequence.computed == sequence.prompt_len:
                    self._keep_prefix(sequence)
                    self._admission.fit_reservation(sequence.group)
        for group in groups_of(plan):
            try:
                self._advance(group)
            except Exception as error:
                _LOG.exception("request %s cannot go on", group.id)
                self._fail(group, error)
        self._scheduler.account(kind, seconds)
        self._observer.step(StepRecord(kind, tags, tokens, seconds))
        return True

    def _exchange(self) -> bool:
        """Take in what was drawn elsewhere, and hand over what is to be; False for neither."""
        if self._relay is None:
            return False
        arrived = self._relay.take_in()
        for group, error in arrived.items():
            if error is not None:
                self._fail(group, error)
            else:
                self._advance(group)
        due = [group for group in self._running if self._relay.is_due(group)]
        for group in due:
            try:
                self._note_version(group)
                self._relay.hand_over(group)
            except Exception as error:  # it concerns this request alone
                _LOG.exception("request %s cannot be handed over", group.id)
                self._fail(group, error)
        return bool(arrived or due)

    def _next_plan(self) -> Plan | None:
        """The next phase; where it would read what is known, that is taken over first."""
        for group in list(self._running):
            for sequence in group.sequences:
                if sequence.chain is None and sequence.status is Status.PREFILL:
                    self._reuse_prefix(sequence, self.prefixes.look_up)
        while True:
            plan = self._scheduler.next(self._running)
            if not isinstance(plan, PrefillPlan):
                return plan
            reused = [self._reuse_prefix(s, self.prefixes.reuse) for s, _ in plan.pieces]
            if not any(reused):
                return plan

    def _reuse_prefix(self, sequence: Sequence, take: Callable[[Sequence], bool]) -> bool:
        try:
            if not sequence.group.is_adapt:
                # Before anything is taken over: whose weights a prompt reads depends on it.
                self._note_version(sequence.group)
            reused = take(sequence)
        except Exception as error:  # it concerns this request alone
            _LOG.exception("request %s cannot start", sequence.group.id)
            self._fail(sequence.group, error)
            return True
        if sequence.computed:
            self._note_version(sequence.group)
        return reused

    def _keep_prefix(self, sequence: Sequence) -> None:
        if sequence.group not in self._running:
            return
        try:
            self.prefixes.keep(sequence)
        except Exception:  # no memory, most likely; the request itself goes on
            _LOG.exception("prefix of request %s not kept; emptying the cache", sequence.group.id)
            self.prefixes.cache.clear()

    def _admit(self) -> None:
        for group, reason in self._admission.overdue():
            self._refuse(group, reason)
        while (candidate := self._admission.next(self._running)) is not None:
            try:
                if not self._admission.admit(candidate):
                    return
            except Exception as error:  # its session can't be had, or there is no memory for it
                if not isinstance(error, PonderError):
                    _LOG.exception("request %s cannot start", candidate.id)
                self._refuse(candidate, error)
                continue
            self._running.append(candidate)

    def _refuse(self, group: Group, error: Exception) -> None:
        """End a request that has not begun."""
        self._admission.forget(group)
        group.sink(ErrorEvent(error))
        self._note_end(group, "error")

    def _note_version(self, group: Group) -> None:
        """What a request begins to read: others may have taught its session while it waited."""
        session = group.session
        if session is None or group.background:
            return
        if not group.digest or (session.version != group.version_before and group.is_unread):
            group.version_before = session.version
            group.digest = self.sessions.digest(session)
            self._admission.decide(group)

    # --- ends ----------------------------------------------------------------------------

    def _advance(self, group: Group) -> None:
        """Take the request on to its next window, or to its end, if it is there."""
        if group not in self._running or group.write is not None:
            return
        if group.is_adapt or group.background:
            sequence = group.sequences[0]
            if sequence.computed < sequence.prompt_len or sequence.spans:
                return
            if group.windows:
                if self._admission.pause(group, self._running):
                    self._running.remove(group)
                    return
                # Behind those who came meanwhile, or a long document would make them starve.
                self._running.remove(group)
                self._running.append(group)
                self._admission.next_window(group)
                return
        elif not all(s.status is Status.FINISHED for s in group.sequences):
            return
        self._complete(group)

    def _complete(self, group: Group) -> None:
        if group.background:
            self._retire(group, None)
            return
        successor = self._background(group)
        pending = len(successor.sequences[0].spans) if successor is not None else 0
        report = ttt_report(group, pending)
        tokens = group.prompt_tokens, group.generated_tokens
        # Of a text that is learned as it grows, generated tokens may be found there as well.
        cached = min(group.cached_tokens, group.prompt_tokens)
        group.sink(DoneEvent(*tokens, report, cached))
        if group.choice is not None:
            self._observer.chosen(group.choice)
        for sequence in group.sequences:
            self._keep_prefix(sequence)
        reason = group.sequences[0].finish_reason
        self._retire(group, "adapted" if reason is None else reason)
        if successor is not None:
            self._running.append(successor)

    def _background(self, group: Group) -> Group | None:
        waiting = sum(g.background for g in self._running)
        if waiting >= self.config.max_num_seqs:
            _LOG.warning("%d answers are still to be learned; not adding another", waiting)
            return None
        successor = background_group(group, self._admission.equip)
        if successor is not None and successor.session is not None:
            self.sessions.acquire(successor.session)
        return successor

    def _retire(self, group: Group, outcome: str | None) -> None:
        self._running.remove(group)
        generated = group.generated_tokens
        if self._relay is not None:
            self._relay.retire(group)
        self._admission.release(group)
        if outcome is not None:
            self._note_end(group, outcome, generated)

    def _fail(self, group: Group, error: Exception) -> None:
        if group not in self._running:
            return
        group.sink(ErrorEvent(error))
        # A request that was answered has been counted.
        self._retire(group, None if group.background else "error")

    def _note_end(self, group: Group, outcome: str, generated: int = 0) -> None:
        seconds = time.monotonic() - group.request.arrival
        self._observer.finished(outcome, group.prompt_tokens, generated, seconds)
