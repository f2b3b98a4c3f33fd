"""The phases of an engine step: prefill, decode, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from ponderttt.adaptation.loss import logit_slices
from ponderttt.engine.choice import Choices, choose, rival_of, succeed
from ponderttt.engine.emitter import Emitter
from ponderttt.engine.learner import Learner
from ponderttt.engine.observer import PhaseKind
from ponderttt.engine.outputs import PromptEvent
from ponderttt.engine.reader import Reader
from ponderttt.engine.request import GenerateRequest
from ponderttt.engine.sampler import (
    NonFiniteLogitsError,
    SampledToken,
    prompt_logprobs,
    sample,
)
from ponderttt.engine.scheduler import DecodePlan, Plan, PrefillPlan, WritePlan
from ponderttt.engine.sequence import Group, Sequence, Span, Status
from ponderttt.fast_weights.bank import StepTag
from ponderttt.models.decoder import Decoder
from ponderttt.models.transfer import settle, tensor_on


class Phases:
    """Turns a plan into tokens, chunks and updates.

    Args:
        model: frozen.
        reader, learner, emitter: the engine's.
        fork: makes sibling `index` of a sequence whose prompt has just been read.
        choices: what was chosen for earlier prompts.
        remote: a `Generator` draws the tokens; here, prompts and chunks are only read.
    """

    def __init__(
        self,
        model: Decoder,
        reader: Reader,
        learner: Learner,
        emitter: Emitter,
        fork: Callable[[Sequence, int], Sequence],
        choices: Choices,
        remote: bool = False,
    ) -> None:
        self._model = model
        self._reader = reader
        self._learner = learner
        self._emitter = emitter
        self._fork = fork
        self._choices = choices
        self._remote = remote
        self.failed: list[tuple[Group, Exception]] = []

    def run(self, plan: Plan) -> tuple[PhaseKind, tuple[StepTag, ...], int]:
        """Run one phase; returns its kind, what it read or wrote, and its rows.

        Requests that failed by themselves are in `failed` afterwards.
        """
        self.failed.clear()
        match plan:
            case PrefillPlan(pieces):
                tags = self._reader.tags([s for s, _ in pieces])
                self._prefill(plan, tags)
                return "prefill", tags, sum(count for _, count in pieces)
            case DecodePlan(sequences):
                tags = self._reader.tags(sequences)
                self._decode(plan, tags)
                return "decode", tags, len(sequences)
            case WritePlan(groups):
                tags, rows = self._learner.step(groups)
                return "write", tags, rows

    @contextmanager
    def _alone(self, sequence: Sequence) -> Iterator[None]:
        """What goes wrong with one sequence of a phase is noted, and the others go on."""
        try:
            yield
        except Exception as error:  # whatever it is, it concerns this request alone
            self.failed.append((sequence.group, error))

    def _prefill(self, plan: PrefillPlan, tags: tuple[StepTag, ...]) -> None:
        begun = time.perf_counter()
        normed = self._reader.read(plan.pieces, tags)
        self._share_time([(s, count) for s, count in plan.pieces], begun)
        _note_versions(plan.pieces, tags)
        done = [
            (s, rows[-1:])
            for (s, _), rows in zip(plan.pieces, normed, strict=True)
            if s.computed == s.prompt_len and isinstance(s.group.request, GenerateRequest)
            if not s.group.background and s.generated == 0
        ]
        for sequence, last in done:
            with self._alone(sequence):
                if sequence is sequence.group.rival:
                    self._judge(sequence)
                elif sequence.group.judges:
                    self._await_rival(sequence)
                else:
                    self._prompt_read(sequence, last)
        broken = {id(group) for group, _ in self.failed}
        for sequence, _ in plan.pieces:
            if id(sequence.group) in broken:
                continue
            if sequence.spans and sequence.computed == sequence.spans[0].end:
                with self._alone(sequence):
                    self._learner.consider(sequence)
            if self._remote:
                _pass_on(sequence)

    def _await_rival(self, sequence: Sequence) -> None:
        """The prompt has been read with the session's weights: now with the base model's."""
        sequence.status = Status.JUDGED
        final = self._reader.new_buffer(sequence.cache.capacity)
        sequence.group.rival = rival_of(sequence, final, self._reader.first_adaptive)

    @torch.inference_mode()
    def _judge(self, rival: Sequence) -> None:
        """Both have read the prompt: whoever predicted it better answers."""
        group = rival.group
        sequence = group.sequences[0]
        # What has taught the session meanwhile makes another comparison of it.
        same = group.session is not None and group.session.version == group.version_before
        prompt = rival.tokens[: rival.prompt_len]
        group.choice = self._choices.recall(group.digest, prompt) if same else None
        if group.choice is None:
            group.choice = choose(self._model, sequence, rival)
            if same:
                self._choices.remember(group.digest, prompt, group.choice)
        group.rival = None
        if group.choice.read == "base":
            sequence = succeed(sequence, rival)
        if sequence.final is None:
            raise RuntimeError("a prompt that is compared keeps final activations")
        self._prompt_read(sequence, sequence.final[sequence.prompt_len - 1 : sequence.prompt_len])

    @torch.inference_mode()
    def _prompt_read(self, sequence: Sequence, last: torch.Tensor) -> None:
        """The prompt has been read: report it, make the siblings, draw the first tokens."""
        group, request = sequence.group, sequence.group.request
        if not isinstance(request, GenerateRequest) or sequence.sampler is None:
            return
        if request.sampling.prompt_logprobs is not None:
            self._report_prompt(sequence, request.sampling.prompt_logprobs)
        siblings = [self._fork(sequence, i) for i in range(1, request.sampling.n)]
        sequence.status = Status.REMOTE if self._remote else Status.DECODE
        group.sequences.extend(siblings)
        if request.sampling.max_tokens == 0:
            for each in group.sequences:
                self._emitter.end(each)
            return
        if self._remote:
            return
        logits = self._model.logits(last)
        for each in group.sequences:
            if each.sampler is not None:
                self._take(each, sample(logits, [each.sampler])[0])

    def _report_prompt(self, sequence: Sequence, top: int) -> None:
        if sequence.final is None:
            raise RuntimeError("scoring a prompt needs its final activations")
        ids = tensor_on(self._model.device, sequence.tokens[1 : sequence.prompt_len])
        scored = []
        for rows, logits in logit_slices(
            sequence.final[: sequence.prompt_len - 1], self._model.head
        ):
            scored += prompt_logprobs(logits, ids[rows], top)
        prompt = tuple(sequence.tokens[: sequence.prompt_len])
        sequence.group.sink(PromptEvent(prompt, (None, *scored)))

    @torch.inference_mode()
    def _decode(self, plan: DecodePlan, tags: tuple[StepTag, ...]) -> None:
        begun = time.perf_counter()
        pieces = [(sequence, 1) for sequence in plan.sequences]
        normed = self._reader.read(pieces, tags, decodes=True)
        logits = self._model.logits(torch.cat(normed))
        states = [s.sampler for s in plan.sequences if s.sampler is not None]
        try:
            tokens = sample(logits, states)
        except NonFiniteLogitsError:
            # Nothing was drawn, so those that are not at fault read this position once more.
            self._reader.take_back(plan.sequences)
            raise
        self._share_time(pieces, begun)
        _note_versions(pieces, tags)
        for sequence, token in zip(plan.sequences, tokens, strict=True):
            with self._alone(sequence):
                self._take(sequence, token)
                self._consider_generated(sequence)

    def _take(self, sequence: Sequence, token: SampledToken) -> None:
        if sequence.generated == 0 and self._learns_generated(sequence.group):
            size = sequence.group.ttt.chunk_size
            start = sequence.prompt_len
            sequence.spans.append(Span(start, start + size, "generated"))
        self._emitter.take(sequence, token)

    def _learns_generated(self, group: Group) -> bool:
        return group.ttt.learns_generated and group.ttt.when == "inline"

    def _consider_generated(self, sequence: Sequence) -> None:
        """Ask the gate about a generated chunk when it is full, or when the text has ended."""
        if not sequence.spans or sequence.spans[0].phase != "generated":
            return
        span, group = sequence.spans[0], sequence.group
        if sequence.status is Status.FINISHED:
            sequence.spans.clear()
            short = self._learner.is_short(sequence.computed - span.start, group.ttt)
            # Weights that live for this request only have no reader left.
            if short or group.session is None or group.session.ephemeral:
                return
            sequence.spans.append(Span(span.start, sequence.computed, "generated"))
            self._learner.consider(sequence)
        elif sequence.computed == span.end:
            self._learner.consider(sequence)
            sequence.spans.append(Span(span.end, span.end + group.ttt.chunk_size, "generated"))

    def _share_time(self, pieces: list[tuple[Sequence, int]], begun: float) -> None:
        settle(self._model.device)
        per_row = (time.perf_counter() - begun) / sum(count for _, count in pieces)
        for sequence, count in pieces:
            sequence.read_seconds += per_row * count


def _pass_on(sequence: Sequence) -> None:
    """Whose generated chunk has been read is to be continued, or was to be learned to its end."""
    reading = sequence.status is Status.PREFILL and sequence.generated > 0
    if reading and not sequence.spans and not sequence.group.background:
        ended = sequence.finish_reason is not None
        sequence.status = Status.FINISHED if ended else Status.REMOTE


def _note_versions(pieces: Iterable[tuple[Sequence, int]], tags: tuple[StepTag, ...]) -> None:
    for (sequence, count), tag in zip(pieces, tags, strict=True):
        sequence.note_read(tag.version, count)


def groups_of(plan: Plan) -> list[Group]:
    """The requests that a phase works on, each once."""
    match plan:
        case PrefillPlan(pieces):
            groups = [sequence.group for sequence, _ in pieces]
        case DecodePlan(sequences):
            groups = [sequence.group for sequence in sequences]
        case WritePlan(writing):
            groups = list(writing)
    return list({id(group): group for group in groups}.values())


def groups_at_fault(plan: Plan, error: Exception) -> list[Group]:
    """The requests that a failed phase takes down: those at fault where that is known."""
    if isinstance(plan, DecodePlan) and isinstance(error, NonFiniteLogitsError):
        return groups_of(DecodePlan(tuple(plan.sequences[row] for row in error.rows)))
    return groups_of(plan)
