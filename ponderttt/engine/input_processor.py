"""Checks requests and settles what holds for them, before anything runs."""

from __future__ import annotations

from collections.abc import Callable

from ponderttt.adaptation.params import GateName, TTTParams
from ponderttt.engine.config import EngineConfig
from ponderttt.engine.kv_reservations import KVReservations
from ponderttt.engine.outputs import Event
from ponderttt.engine.request import AdaptRequest, GenerateRequest, Request
from ponderttt.engine.resolve import ResolvedTTT, for_documents, resolve_ttt
from ponderttt.engine.sampler_state import check_logit_bias
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.engine.sequence import Group
from ponderttt.errors import InvalidRequestError, PromptTooLongError
from ponderttt.sessions.manager import SessionManager


class InputProcessor:
    """Turns what callers ask for into what the engine works on. Reads only: for any thread.

    Args:
        vocab_size: token ids lie below it.
        sessions: which ones there are.
        kv: how many positions a request may need.
        config: limits and defaults.
        max_model_len: tokens of prompt and completion together.
        default_gate: where neither request nor session names one.
        has_policy: whether gate `policy` can be used.
        remote: a `Generator` draws the tokens.
    """

    def __init__(
        self,
        vocab_size: int,
        sessions: SessionManager,
        kv: KVReservations,
        config: EngineConfig,
        max_model_len: int,
        default_gate: GateName,
        has_policy: bool,
        remote: bool = False,
    ) -> None:
        self._vocab_size = vocab_size
        self._sessions = sessions
        self._kv = kv
        self._config = config
        self._max_model_len = max_model_len
        self._default_gate = default_gate
        self._has_policy = has_policy
        self._remote = remote

    def prepare(self, request: Request, sink: Callable[[Event], None]) -> Group:
        """Check a request and wrap it.

        Args:
            request: as it came.
            sink: takes its events, in the engine's thread.
        Raises:
            InvalidRequestError, PromptTooLongError: it can't run here.
            NotFoundError, DamagedSessionError: as `SessionManager.get`, of the session it names.
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
        low, high = min(ids), max(ids)
        if low < 0 or high >= self._vocab_size:
            bad = low if low < 0 else high
            raise InvalidRequestError(
                param, f"token id {bad} lies outside the vocabulary [0, {self._vocab_size - 1}]"
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
        length = self._kv.capacity(request, ttt)
        reserve = length * self._kv.readers(request)
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
        check_logit_bias(sampling, self._vocab_size)


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
