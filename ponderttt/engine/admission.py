"""Admission: checks requests, keeps them waiting, and gives them what they need to run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from ponderttt.adaptation.chunking import chunk_spans
from ponderttt.adaptation.params import GateName, TTTParams
from ponderttt.engine.arrivals import Arrivals
from ponderttt.engine.choice import LEAST_JUDGED, Choices
from ponderttt.engine.config import EngineConfig
from ponderttt.engine.detokenizer import IncrementalDetokenizer
from ponderttt.engine.outputs import Event
from ponderttt.engine.queue import FairQueue
from ponderttt.engine.reader import Reader
from ponderttt.engine.request import AdaptRequest, GenerateRequest, Request, Tenant
from ponderttt.engine.resolve import ResolvedTTT, for_documents, resolve_ttt
from ponderttt.engine.sampler_state import SamplerState, check_logit_bias
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.engine.sequence import Group, Sequence, Span, Status
from ponderttt.errors import (
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PromptTooLongError,
)
from ponderttt.models.decoder import Decoder
from ponderttt.models.tokenizer import Tokenizer
from ponderttt.sessions.manager import SessionManager

# Requests from the queue's head on whose sessions are read from the store at one time, at most:
# what has come is in RAM until its request begins.
_READ_AHEAD = 8


class Admission:
    """The door of the engine.

    Args:
        model, tokenizer, sessions, reader, config: the engine's.
        max_model_len: tokens of prompt and completion together.
        default_gate: where neither request nor session names one.
        has_policy: whether gate `policy` can be used.
        choices: what was chosen for earlier prompts.
        remote: a `Generator` draws the tokens, so that only what is learned or scored is read here.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        sessions: SessionManager,
        reader: Reader,
        config: EngineConfig,
        max_model_len: int,
        default_gate: GateName,
        has_policy: bool,
        choices: Choices,
        remote: bool = False,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._sessions = sessions
        self._reader = reader
        self._config = config
        self._max_model_len = max_model_len
        self._default_gate = default_gate
        self._has_policy = has_policy
        self._choices = choices
        self._remote = remote
        # Apart, so that no completion waits behind a document that takes minutes.
        self._completions = FairQueue()
        self._adapts = FairQueue()
        self._arrivals = Arrivals(sessions)
        self.kv_reserved = 0
        self._kv_adapting = 0  # the adapt requests' part of it

    # --- checking: reads only, so that any thread may call it -----------------------------------

    def prepare(self, request: Request, sink: Callable[[Event], None]) -> Group:
        """Check a request and wrap it.

        Raises:
            InvalidRequestError, PromptTooLongError, NotFoundError.
        """
        asked = request.ttt or _unasked(request)
        session = self._sessions.get(asked.session) if asked.session is not None else None
        ttt = resolve_ttt(
            asked,
            session.defaults if session is not None else TTTParams(),
            self._config.ttt,
            self._default_gate,
            self._has_policy,
        )
        if isinstance(request, AdaptRequest):
            if session is None:
                raise InvalidRequestError("ttt.session", "adapting needs a session; name one")
            ttt = for_documents(ttt)
            self._check_documents(request)
        else:
            self._check_prompt(request, ttt)
            if request.sampling.n > 1 and ttt.learns_generated:
                raise InvalidRequestError(
                    "n",
                    f"{request.sampling.n} sequences can't all teach the same fast weights; "
                    "use n = 1, or ttt.adapt_on = 'prompt'",
                )
            if self._remote and ttt.learns_generated and ttt.when == "inline":
                _check_parts(request.sampling)
        return Group(request, session, request.ttt is not None, ttt, sink)

    def _check_ids(self, param: str, ids: tuple[int, ...]) -> None:
        if not ids:
            raise InvalidRequestError(param, "is empty; give at least one token")
        vocabulary = self._model.config.vocab_size
        low, high = min(ids), max(ids)
        if low < 0 or high >= vocabulary:
            bad = low if low < 0 else high
            raise InvalidRequestError(
                param, f"token id {bad} lies outside the vocabulary [0, {vocabulary - 1}]"
            )

    def _check_documents(self, request: AdaptRequest) -> None:
        if not request.documents:
            raise InvalidRequestError("documents", "is empty; give at least one document")
        for number, document in enumerate(request.documents):
            self._check_ids(f"documents[{number}].text", document)

    def _check_prompt(self, request: GenerateRequest, ttt: ResolvedTTT) -> None:
        sampling = request.sampling
        self._check_ids("prompt", request.prompt_ids)
        room = self._max_model_len - len(request.prompt_ids)
        if room < 0:
            raise PromptTooLongError(
                "prompt",
                f"{len(request.prompt_ids)} tokens exceed the context window of "
                f"{self._max_model_len}; shorten it, or teach it to a session with "
                "POST /v1/sessions/{id}/adapt",
            )
        if sampling.max_tokens > room:
            raise PromptTooLongError(
                "max_tokens",
                f"{sampling.max_tokens} new tokens after a prompt of {len(request.prompt_ids)} "
                f"exceed the context window of {self._max_model_len}; ask for at most {room}",
            )
        length = self._capacity(request, ttt)
        reserve = length * self._readers(request)
        if reserve > self._config.max_kv_tokens:
            raise InvalidRequestError(
                "n",
                f"{sampling.n} sequences of up to {length} tokens need more than "
                f"the {self._config.max_kv_tokens} positions of the KV cache; ask for fewer",
            )
        if sampling.n > self._config.max_num_seqs:
            raise InvalidRequestError(
                "n",
                f"{sampling.n} exceeds the {self._config.max_num_seqs} sequences that run at once",
            )
        check_logit_bias(sampling, self._model.config.vocab_size)

    # --- waiting and starting: in the engine's thread -------------------------------------------

    def enqueue(self, group: Group) -> None:
        """Let the request wait its turn.

        Raises:
            OverloadedError: the queue is full, or its tenant's part of it.
        """
        self.check_room(group.request.tenant)
        self._queue(group).append(group)

    def check_room(self, tenant: Tenant, arriving: int = 0, arriving_of_tenant: int = 0) -> None:
        """Raise OverloadedError where no further request may wait; from any thread.

        Args:
            tenant: who asks.
            arriving, arriving_of_tenant: requests on their way to the queue: all, and theirs.
        """
        if self.waiting + arriving >= self._config.max_waiting:
            raise OverloadedError(
                f"{self._config.max_waiting} requests are waiting, which is the limit; retry later"
            )
        theirs = self._completions.count(tenant.id) + self._adapts.count(tenant.id)
        if tenant.max_waiting is not None and theirs + arriving_of_tenant >= tenant.max_waiting:
            raise OverloadedError(
                f"{tenant.max_waiting} requests of yours are waiting, which is the limit for one "
                "key; retry later"
            )

    @property
    def waiting(self) -> int:
        """Requests in the queue; from any thread."""
        return len(self._completions) + len(self._adapts)

    def queued(self) -> list[Group]:
        """All requests that wait."""
        return [*self._completions, *self._adapts]

    def forget(self, group: Group) -> bool:
        """Take a request off the queue; whether it was there."""
        queue = self._queue(group)
        if group not in queue:
            return False
        queue.remove(group)
        self._arrivals.forget(group.session)
        return True

    def overdue(self) -> list[tuple[Group, OverloadedError]]:
        """Take off the queue what has waited too long, each with what to tell its caller."""
        limit = self._config.max_wait_seconds
        if limit is None:
            return []
        then = time.monotonic() - limit
        late = [*self._completions.older_than(then), *self._adapts.older_than(then)]
        for group in late:
            self.forget(group)
        message = f"the request has waited {limit:g} s, which is the limit; retry later"
        return [(group, OverloadedError(message)) for group in late]

    def next(self, running: Iterable[Group]) -> Group | None:
        """The waiting request whose turn it is, if there is a place for it beside `running`."""
        running = list(running)
        places = self._config.max_num_seqs
        for group in running:
            if not (group.is_adapt or group.background):
                places -= max(len(group.sequences), _sequences(group.request))
        head = self._first_at_hand(self._completions)
        if head is not None and _sequences(head.request) <= places:
            return head
        adapting = _adapting_by_tenant(running)
        if adapting.total() >= self._config.max_adapting:
            return None
        waiting = self._at_hand(self._adapts)
        return min(waiting, key=lambda g: adapting[g.request.tenant.id], default=None)

    def pause(self, group: Group, running: Iterable[Group]) -> bool:
        """Have documents that are between two windows wait, where it is somebody else's turn.

        Else whoever came first with documents that take minutes would hold every place as long.

        Returns:
            Whether they wait now; they hold nothing meanwhile.
        """
        adapting = _adapting_by_tenant(running)
        mine = adapting[group.request.tenant.id]
        if not any(adapting[g.request.tenant.id] < mine for g in self._at_hand(self._adapts)):
            return False
        self.release(group)
        self._adapts.put_back(group)
        return True

    def _first_at_hand(self, queue: FairQueue) -> Group | None:
        """Whose turn it is, of those whose session need not be read from the store first."""
        head = queue.head
        if head is None or not self._arrivals.is_awaited(head.session):
            return head
        return next(self._at_hand(queue), None)

    def _at_hand(self, queue: FairQueue) -> Iterator[Group]:
        awaited = 0
        for group in queue:
            if self._arrivals.is_awaited(group.session, send_for=awaited < _READ_AHEAD):
                awaited += 1
            else:
                yield group

    @property
    def awaits_sessions(self) -> bool:
        """Whether sessions that requests wait for are on their way from the store."""
        return bool(self._arrivals)

    def admit(self, group: Group) -> bool:
        """Start the request that `next` has named; False where memory or slots are in use.

        Raises:
            NotFoundError: its session was deleted while it waited.
            DamagedSessionError, ConflictError, StoreError: its session can't be read.
        """
        if group.session is not None and not group.session.ephemeral:
            self._check_session_lives(group)
        need = self._reservation(group)
        if not self._has_kv_room(group, need):
            return False
        if group.session is None and self._needs_weights(group):
            group.session = self._sessions.create_ephemeral(group.id)
        if group.session is not None and not (
            self._arrivals.take_in(group.session) and self._sessions.acquire(group.session)
        ):
            return False
        self._queue(group).take(group)
        try:
            self._start(group, need)
        except Exception:
            self.release(group)
            raise
        return True

    def _queue(self, group: Group) -> FairQueue:
        return self._adapts if group.is_adapt else self._completions

    def _has_kv_room(self, group: Group, need: int) -> bool:
        config = self._config
        adapting = self._kv_adapting + need
        if group.is_adapt and self._kv_adapting and adapting > config.max_adapting_kv_tokens:
            return False
        return self.kv_reserved == 0 or self.kv_reserved + need <= config.max_kv_tokens

    def _check_session_lives(self, group: Group) -> None:
        session = group.session
        if session is None or session.ephemeral:
            return
        if not self._sessions.has(session):
            self._arrivals.forget(session)
            group.session = None
            raise NotFoundError("ttt.session", f"session {session.id!r} was deleted meanwhile")

    @property
    def _window(self) -> int:
        """Tokens of a document that are read in one go."""
        return min(self._max_model_len, self._config.max_adapting_kv_tokens)

    def _needs_weights(self, group: Group) -> bool:
        return group.ttt.learns_prompt or group.ttt.learns_generated

    def _reservation(self, group: Group) -> int:
        """Positions of KV cache that the request may need."""
        request = group.request
        if isinstance(request, GenerateRequest):
            readers = self._readers_now(group, request, self._expects_to_judge(group, request))
            return self._capacity(request, group.ttt) * readers
        return min(max(len(d) for d in request.documents), self._window)

    def _may_judge(self, group: Group) -> bool:
        """Whether the prompt may tell whose weights are to answer it.

        Not where chunks of the answer are learned before the next is drawn: they would be read with
        other weights than those they are learned by. Nor where there is no room for two readings.
        """
        request, ttt, session = group.request, group.ttt, group.session
        if session is None or session.ephemeral or self._remote or ttt.read == "session":
            return False
        if not isinstance(request, GenerateRequest) or request.sampling.max_tokens == 0:
            return False
        if ttt.learns_generated and ttt.when == "inline":
            return False
        enough = len(request.prompt_ids) >= LEAST_JUDGED
        return enough and 2 * self._capacity(request, ttt) <= self._config.max_kv_tokens

    def _expects_to_judge(self, group: Group, request: GenerateRequest) -> bool:
        """As `decide` would find now, before the session is needed."""
        session = group.session
        if session is None or not self._may_judge(group):
            return False
        if session.cold:
            return True  # what it has learned is not known yet
        if session.version == 0:
            return False
        learns = group.ttt.learns_prompt and group.ttt.when == "inline"
        digest = self._sessions.digest(session)
        return learns or self._choices.recall(digest, request.prompt_ids) is None

    def decide(self, group: Group) -> None:
        """Whether the prompt is to be judged, or what came of it the last time.

        Call it before any of it is read, once it is known what the session's weights are.
        """
        if group.is_adapt or not group.sequences:
            return
        session, sequence = group.session, group.sequences[0]
        # Weights that nothing has changed are the base model's.
        group.judges = session is not None and session.version > 0 and self._may_judge(group)
        group.choice, sequence.base = None, False
        # What teaches the session while it is read has losses of several versions.
        if group.judges and not sequence.spans:
            group.choice = self._choices.recall(group.digest, sequence.tokens)
            group.judges = group.choice is None
            sequence.base = group.choice is not None and group.choice.read == "base"
        self.fit_reservation(group)

    def fit_reservation(self, group: Group) -> None:
        """Give back, or take, what the request needs less or more than it has set aside."""
        request = group.request
        if not group.reserved or not isinstance(request, GenerateRequest):
            return
        readers = self._readers_now(group, request, group.judges)
        need = self._capacity(request, group.ttt) * readers
        self.kv_reserved += need - group.reserved
        group.reserved = need

    def _readers_now(self, group: Group, request: GenerateRequest, judges: bool) -> int:
        """Sequences of the request that hold keys and values, the rival among them."""
        count = self._readers(request)
        if not judges:
            return count
        if group.ttt.learns_prompt and group.ttt.when == "inline":
            # A chunk to be learned keeps what the session has read, whoever answers.
            return count + 1
        # The rival has gone when siblings come.
        return max(count, 2) if group.choice is None else count

    def _readers(self, request: GenerateRequest) -> int:
        """Sequences of the request that are read here: elsewhere, siblings are only drawn."""
        return 1 if self._remote else request.sampling.n

    def _capacity(self, request: GenerateRequest, ttt: ResolvedTTT) -> int:
        """Positions of KV cache that one sequence may need."""
        prompt, new = len(request.prompt_ids), request.sampling.max_tokens
        if not self._remote:
            return prompt + new
        if ttt.learns_generated and ttt.when == "inline":
            return prompt + new
        return prompt if self._reads_prompt_first(request, ttt) else 0

    def _reads_prompt_first(self, request: GenerateRequest, ttt: ResolvedTTT) -> bool:
        """Whether the prompt is read here before anything is generated."""
        sampling = request.sampling
        scores = sampling.prompt_logprobs is not None or sampling.max_tokens == 0
        return not self._remote or scores or (ttt.learns_prompt and ttt.when == "inline")

    def _start(self, group: Group, reserve: int) -> None:
        group.reserved = reserve
        self.kv_reserved += reserve
        request = group.request
        if isinstance(request, AdaptRequest):
            self._kv_adapting += reserve
            if not group.has_begun:
                size = self._window
                group.windows.extend(
                    (number, document[at : at + size])
                    for number, document in enumerate(request.documents)
                    for at in range(0, len(document), size)
                )
            self.next_window(group)
        else:
            sequence = self._prompt_sequence(group, request)
            group.sequences.append(sequence)
            if not self._reads_prompt_first(request, group.ttt):
                sequence.status = Status.REMOTE
                count = request.sampling.n
                group.sequences += [self.fork_sequence(sequence, i) for i in range(1, count)]

    def _prompt_sequence(self, group: Group, request: GenerateRequest) -> Sequence:
        tokens = list(request.prompt_ids)
        ttt = group.ttt
        capacity = self._capacity(request, ttt)
        sequence = Sequence(group, 0, tokens, len(tokens), self._model.new_cache(capacity))
        scores = request.sampling.prompt_logprobs is not None
        # Kept from the session's first request on, since later ones compare with what it has read.
        observed = self._needs_weights(group) or scores or self._may_judge(group)
        if not capacity:
            pass  # it is not read here
        elif observed:
            sequence.boundary, sequence.final = self._reader.new_buffers(capacity)
        elif self._config.prefix_cache_bytes:
            sequence.boundary = self._reader.new_buffer(capacity)
        if ttt.learns_prompt and ttt.when == "inline":
            sequence.spans.extend(
                Span(*span, "prompt") for span in chunk_spans(0, len(tokens), ttt.chunk_size)
            )
        sequence.sampler = SamplerState(request.sampling, request.prompt_ids)
        sequence.detokenizer = IncrementalDetokenizer(self._tokenizer, request.sampling.stop)
        return sequence

    def next_window(self, group: Group) -> None:
        """Begin the next document window of an adapt request."""
        document, tokens = group.windows.popleft()
        sequence = Sequence(
            group,
            0,
            list(tokens),
            len(tokens),
            self._model.new_cache(len(tokens)),
            document=document,
        )
        sequence.boundary, sequence.final = self._reader.new_buffers(len(tokens))
        spans = chunk_spans(0, len(tokens), group.ttt.chunk_size)
        sequence.spans.extend(Span(*span, "prompt") for span in spans)
        group.sequences = [sequence]

    def fork_sequence(self, parent: Sequence, index: int) -> Sequence:
        """Sibling `index` of a sequence whose prompt has just been read."""
        request = parent.group.request
        if not isinstance(request, GenerateRequest) or parent.sampler is None:
            raise RuntimeError("only sequences that generate have siblings")
        cache = self._model.new_cache(0) if self._remote else parent.cache.fork()
        child = Sequence(parent.group, index, list(parent.tokens), parent.prompt_len, cache)
        child.computed, child.base = parent.computed, parent.base
        child.status = Status.REMOTE if self._remote else Status.DECODE
        child.sampler = SamplerState(
            request.sampling, request.prompt_ids, seed=parent.sampler.seed, child=index
        )
        child.detokenizer = IncrementalDetokenizer(self._tokenizer, request.sampling.stop)
        return child

    def equip(self, sequence: Sequence) -> None:
        """Cache and buffers for a sequence that is to be read from its beginning."""
        sequence.cache = self._model.new_cache(sequence.prompt_len)
        sequence.boundary, sequence.final = self._reader.new_buffers(sequence.prompt_len)

    def release(self, group: Group) -> None:
        """Give back what the request held."""
        self.kv_reserved -= group.reserved
        self._kv_adapting -= group.reserved if group.is_adapt else 0
        group.reserved = 0
        group.sequences, group.rival = [], None
        if group.session is not None:
            self._sessions.release(group.session)


def _adapting_by_tenant(running: Iterable[Group]) -> Counter[str | None]:
    return Counter(group.request.tenant.id for group in running if group.is_adapt)


def _sequences(request: Request) -> int:
    return request.sampling.n if isinstance(request, GenerateRequest) else 1


def _check_parts(sampling: SamplingParams) -> None:
    """Elsewhere, a text that is learned as it grows is continued part by part.

    To whoever continues it, earlier parts belong to the prompt, which these penalties don't count.
    """
    for name in ("presence_penalty", "frequency_penalty"):
        if value := getattr(sampling, name):
            raise InvalidRequestError(
                name,
                f"{value} can't be kept up over a text that is learned while it is generated; "
                "leave it out, use repetition_penalty, or ttt.adapt_on = 'prompt'",
            )


def _unasked(request: Request) -> TTTParams:
    """What holds where the caller said nothing: scoring a prompt measures the model as it is."""
    scores = isinstance(request, GenerateRequest) and request.sampling.max_tokens == 0
    return TTTParams(gate="off") if scores else TTTParams()
