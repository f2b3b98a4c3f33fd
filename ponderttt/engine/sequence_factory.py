"""Makes sequences: with the cache, buffers, sampler and detokenizer that each needs."""

from __future__ import annotations

from ponderttt.adaptation.chunking import chunk_spans
from ponderttt.engine.detokenizer import IncrementalDetokenizer
from ponderttt.engine.kv_reservations import KVReservations
from ponderttt.engine.reader import Reader
from ponderttt.engine.request import AdaptRequest, GenerateRequest
from ponderttt.engine.sampler_state import SamplerState
from ponderttt.engine.sequence import Group, Sequence, Span, Status
from ponderttt.models.decoder import Decoder
from ponderttt.models.tokenizer import Tokenizer


class SequenceFactory:
    """Makes the sequences of requests, and has them keep what their chunks will need.

    Args:
        model, tokenizer, reader: the engine's.
        kv: how many positions a sequence may need.
        keeps_prefixes: there is a prefix cache, for which prompts keep boundary activations.
        remote: a `Generator` draws the tokens, so that only what is learned or scored is read here.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        reader: Reader,
        kv: KVReservations,
        keeps_prefixes: bool,
        remote: bool = False,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._reader = reader
        self._kv = kv
        self._keeps_prefixes = keeps_prefixes
        self._remote = remote

    def begin(self, group: Group, *, may_judge: bool) -> None:
        """Give a request the sequences that it begins with, or goes on with after a pause.

        Args:
            group: admitted just now.
            may_judge: its prompt, now or in a later request, may tell whose weights answer.
        """
        request = group.request
        if isinstance(request, AdaptRequest):
            if not group.has_begun:
                size = self._kv.window
                group.windows.extend(
                    (number, document[at : at + size])
                    for number, document in enumerate(request.documents)
                    for at in range(0, len(document), size)
                )
            self.next_window(group)
        else:
            sequence = self._prompt(group, request, may_judge)
            group.sequences.append(sequence)
            if not self._kv.reads_prompt_first(request, group.ttt):
                sequence.status = Status.REMOTE
                count = request.sampling.n
                group.sequences += [self.fork(sequence, i) for i in range(1, count)]

    def _prompt(self, group: Group, request: GenerateRequest, may_judge: bool) -> Sequence:
        tokens = list(request.prompt_ids)
        ttt = group.ttt
        capacity = self._kv.capacity(request, ttt)
        sequence = Sequence(group, 0, tokens, len(tokens), self._model.new_cache(capacity))
        scores = request.sampling.prompt_logprobs is not None
        # Kept from the session's first request on, since later ones compare with what it has read.
        observed = ttt.learns or scores or may_judge
        if not capacity:
            pass  # it is not read here
        elif observed:
            sequence.boundary, sequence.final = self._reader.new_buffers(capacity)
        elif self._keeps_prefixes:
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

    def fork(self, parent: Sequence, index: int) -> Sequence:
        """Sibling `index` of a sequence whose prompt has just been read.

        Raises:
            RuntimeError: it is one of a document, which has no siblings.
        """
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
