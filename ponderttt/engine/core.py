"""The engine: puts the parts together, and runs phase after phase.

Everything here but `prepare` runs in one thread. `Engine` and `AsyncEngine` are the fronts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import torch

from ponderttt.adaptation.actions import NOMINAL, CostModel
from ponderttt.adaptation.calibration import calibration_for
from ponderttt.adaptation.params import GateName
from ponderttt.adaptation.policy import PolicyGate
from ponderttt.adaptation.rules import UpdateRule
from ponderttt.adaptation.update import Writer
from ponderttt.engine.admission import Admission
from ponderttt.engine.choice import Choices
from ponderttt.engine.config import DEFAULT_MODEL_LEN, EngineConfig
from ponderttt.engine.costs import estimate_costs, machine_costs
from ponderttt.engine.emitter import Emitter
from ponderttt.engine.generator import AdapterCounts, Generator
from ponderttt.engine.input_processor import InputProcessor
from ponderttt.engine.kv_reservations import KVReservations
from ponderttt.engine.learner import Learner
from ponderttt.engine.lifecycle import Lifecycle
from ponderttt.engine.observer import EngineObserver, NullObserver, StepRecord
from ponderttt.engine.outputs import Event
from ponderttt.engine.phases import Phases, groups_at_fault, groups_of
from ponderttt.engine.planner import Planner
from ponderttt.engine.prefix_cache import PrefixCache
from ponderttt.engine.prefix_reuse import PrefixReuse
from ponderttt.engine.reader import Reader
from ponderttt.engine.relay import Relay
from ponderttt.engine.request import Request, Tenant
from ponderttt.engine.scheduler import PrefillPlan, Scheduler
from ponderttt.engine.sequence import Group, Status
from ponderttt.engine.sequence_factory import SequenceFactory
from ponderttt.engine.stats import EngineStats
from ponderttt.engine.weights_selector import WeightsSelector
from ponderttt.fast_weights.bank import AdapterBank
from ponderttt.fast_weights.layout import AdapterLayout
from ponderttt.fast_weights.peft_format import export_adapter
from ponderttt.models.decoder import Decoder
from ponderttt.models.tokenizer import Tokenizer
from ponderttt.models.transfer import settle
from ponderttt.sessions.codec import StateCodec
from ponderttt.sessions.files import open_files
from ponderttt.sessions.manager import SessionManager
from ponderttt.sessions.store import SessionStore

_LOG = logging.getLogger(__name__)

# How often to look whether a session has come from the store.
_LOOK_SECONDS = 0.005


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
        remote = generator is not None
        choices = Choices()
        self._kv = KVReservations(config, self.max_model_len, remote)
        self._weights = WeightsSelector(self.sessions, choices, self._kv, config, remote)
        factory = SequenceFactory(
            model, tokenizer, self.reader, self._kv, config.prefix_cache_bytes > 0, remote
        )
        self._inputs = InputProcessor(
            model.config.vocab_size, self.sessions, self._kv, config,
            self.max_model_len, self.default_gate, policy is not None, remote,
        )  # fmt: skip
        self._admission = Admission(self.sessions, self._kv, self._weights, factory, config)
        self._phases = Phases(
            model, self.reader, self._learner, self._emitter, factory.fork, choices, remote
        )
        self._relay: Relay | None = None
        if generator is not None:
            generator.on_published = lambda seconds: self._observer.published(seconds)
            self._relay = Relay(
                generator, self._emitter, self._learner, self.sessions, layout,
                tokenizer.eos_token_ids, model_name,
            )  # fmt: skip
        self._lifecycle = Lifecycle(
            self._admission, factory, self.sessions, self.prefixes, config, self._relay
        )
        self._planner = Planner(self._scheduler, self.prefixes, self._weights, self._lifecycle)
        self._close_guard = threading.Lock()
        self._closed = False
        self.sessions.on_reset = self.prefixes.cache.drop
        if config.store is not None:
            codec = StateCodec(layout, self.bank.fresh_weights, model_name, rule.max_norm)
            files = open_files(config.store.url)
            store = SessionStore(files, codec, config.store.keep_versions)
            self.sessions.attach(store, config.store)

    def measure_costs(self, chunk_size: int) -> CostModel:
        """Time the actions on this machine, or recall earlier figures, and use them from now on."""
        # No chunk is longer than the context.
        size = min(chunk_size, self.max_model_len)
        self.costs["measured"] = machine_costs(
            self.model, self.bank, self.writer, self.model_name, size
        )
        return self.costs["measured"]

    @property
    def observer(self) -> EngineObserver:
        """Who hears of steps, chunks and requests."""
        return self._observer

    @observer.setter
    def observer(self, observer: EngineObserver) -> None:
        self._observer = self._lifecycle.observer = observer
        self._learner.observer = self._emitter.observer = observer

    def call_on_arrival(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, from any thread, when `step` has something to do once more."""
        if self._relay is not None:
            self._relay.generator.on_arrival = wake

    # --- requests ------------------------------------------------------------------------

    def prepare(self, request: Request, sink: Callable[[Event], None]) -> Group:
        """Check a request; from any thread. See `InputProcessor.prepare` for the errors."""
        return self._inputs.prepare(request, sink)

    def enqueue(self, group: Group) -> None:
        """Let a prepared request wait its turn; OverloadedError where the queue is full."""
        self._admission.enqueue(group)

    def abort(self, request_id: str) -> None:
        """Forget a request; an update of it that is not committed is dropped."""
        self._lifecycle.abort(request_id)

    def abort_all(self, error: Exception) -> None:
        """End every request with an error."""
        self._lifecycle.abort_all(error)

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
        learning = [g for g in self._lifecycle.running if g.background and g.session is session]
        # Where the session can't be deleted, it goes on learning.
        if len(learning) == session.pins:
            for group in learning:
                self._lifecycle.retire(group, None)
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
        return bool(self._lifecycle.running or self._admission.waiting)

    @property
    def has_requests(self) -> bool:
        """Whether anybody waits for an answer (background learning not counted)."""
        return bool(self._admission.waiting) or any(
            not g.background for g in self._lifecycle.running
        )

    def next_due(self) -> float | None:
        """Seconds after which `step` is to be called though nothing has come; None: never."""
        due = self.sessions.next_due()
        if self._admission.awaits_sessions:
            return _LOOK_SECONDS if due is None else min(due, _LOOK_SECONDS)
        return due

    def stats(self) -> EngineStats:
        """Counts of this moment."""
        interactive = [g for g in self._lifecycle.running if not g.background]
        return EngineStats(
            running=sum(s.status is not Status.FINISHED for g in interactive for s in g.sequences),
            waiting=self._admission.waiting,
            background=len(self._lifecycle.running) - len(interactive),
            kv_tokens=self._kv.reserved,
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
        self._lifecycle.admit()
        arrived = self._exchange()
        plan = self._planner.next()
        if plan is None:
            return arrived
        begun = time.perf_counter()
        try:
            for group in groups_of(plan):
                self._weights.note_version(group)
            kind, tags, tokens = self._phases.run(plan)
            settle(self.model.device)
        except Exception as error:  # one request's trouble must not end the others
            _LOG.exception("a phase failed")
            for group in groups_at_fault(plan, error):
                self._lifecycle.fail(group, error)
            return True
        seconds = time.perf_counter() - begun
        for group, reason in self._phases.failed:
            _LOG.error("request %s failed", group.id, exc_info=reason)
            self._lifecycle.fail(group, reason)
        if isinstance(plan, PrefillPlan):
            # First tokens have gone out: those who wait for them need not wait for this.
            for sequence, _ in plan.pieces:
                read = sequence.computed == sequence.prompt_len
                if read and sequence.group in self._lifecycle.running:
                    self.prefixes.keep(sequence)
                    self._kv.fit(sequence.group)
        for group in groups_of(plan):
            self._lifecycle.advance(group)
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
                self._lifecycle.fail(group, error)
            else:
                self._lifecycle.advance(group)
        due = [group for group in self._lifecycle.running if self._relay.is_due(group)]
        for group in due:
            try:
                self._weights.note_version(group)
                self._relay.hand_over(group)
            except Exception as error:  # it concerns this request alone
                _LOG.exception("request %s cannot be handed over", group.id)
                self._lifecycle.fail(group, error)
        return bool(arrived or due)
