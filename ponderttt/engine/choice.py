"""Whose weights answer: the session's, where they predict the prompt better than the base model.

What a session has learned of a repository helps there and does harm elsewhere. The prompt tells
which it is: it is read with the base model's weights, too (the adaptive blocks only, over the same
boundary activations). The session goes on where its loss is lower beyond doubt: by a one-sided test
at 5%, in which tokens count as independent. The base model does where there is little to tell them
apart by.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from ponderttt.adaptation.loss import token_losses
from ponderttt.engine.outputs import Choice, ReadWeights
from ponderttt.engine.sequence import Sequence
from ponderttt.models.decoder import Decoder
from ponderttt.models.transfer import tensor_on

#: Tokens of a prompt below which nothing can be told: the session answers.
LEAST_JUDGED = 17
# Predictions that are compared, evenly spread. Each takes two products with the vocabulary.
_MOST_ROWS = 128
# Standard errors of the mean difference: 5% of a normal distribution lie beyond.
_SURE = 1.645
# What was chosen is remembered for so many prompts.
_REMEMBERED = 4096


def judged_tokens(prompt_len: int) -> int:
    """Tokens of a prompt, from its beginning, that are compared.

    A multiple of a sixteenth to an eighth of its length, and of 16, so that prompts that grow by a
    few keystrokes are judged alike, and once.
    """
    step = max(16, 1 << prompt_len.bit_length() >> 4)
    return prompt_len // step * step


class Choices:
    """What was chosen, by the session's weights and what was compared; least recently used out."""

    def __init__(self) -> None:
        self._made: OrderedDict[bytes, Choice] = OrderedDict()

    def recall(self, digest: str, prompt: Seq[int]) -> Choice | None:
        """What these weights were found to be on this prompt.

        Args:
            digest: of the session's weights.
            prompt: token ids.
        """
        key = _key(digest, prompt)
        if key in self._made:
            self._made.move_to_end(key)
        return self._made.get(key)

    def remember(self, digest: str, prompt: Seq[int], choice: Choice) -> None:
        """Keep it for prompts that begin alike, unless its losses are no numbers."""
        if not math.isfinite(choice.session + choice.base):
            return
        self._made[_key(digest, prompt)] = choice
        if len(self._made) > _REMEMBERED:
            self._made.popitem(last=False)


def _key(digest: str, prompt: Seq[int]) -> bytes:
    judged = array("q", prompt[: judged_tokens(len(prompt))]).tobytes()
    return hashlib.sha256(digest.encode() + judged).digest()


def rival_of(sequence: Sequence, final: Tensor, first_adaptive: int) -> Sequence:
    """The same prompt, to be read with the base model's weights.

    Args:
        sequence: has been read to its prompt's end.
        final: a buffer like its own.
        first_adaptive: index of the first adaptive block; those below are read.
    """
    cache = sequence.cache.fork(first_adaptive)
    cache.length = 0
    return Sequence(
        sequence.group,
        sequence.index,
        sequence.tokens[: sequence.prompt_len],
        sequence.prompt_len,
        cache,
        boundary=sequence.boundary,
        final=final,
        known=sequence.prompt_len,
        chain=sequence.chain,
        base=True,
    )


def choose(model: Decoder, sequence: Sequence, rival: Sequence) -> Choice:
    """Compare the losses of a prompt that both have read."""
    count = judged_tokens(sequence.prompt_len) - 1
    rows = torch.linspace(0, count - 1, min(count, _MOST_ROWS), device=model.device).long()
    targets = tensor_on(model.device, sequence.tokens[1 : count + 1])[rows]
    both = []
    for each in (sequence, rival):
        if each.final is None:
            raise RuntimeError("a prompt that is compared keeps final activations")
        both.append(token_losses(each.final[rows], model.head, targets))
    session, base = both
    worse = session - base
    error = float(worse.std()) / math.sqrt(len(rows))
    # Where one is not a number, the session answers: its request fails and says why.
    read: ReadWeights = "base" if float(worse.mean()) >= -_SURE * error else "session"
    return Choice(read, float(session.mean()), float(base.mean()), error, len(rows))


def succeed(sequence: Sequence, rival: Sequence) -> Sequence:
    """Have the rival answer in the sequence's place.

    What the sequence has read stays as it is, for the chunk that it may still have to learn.
    """
    rival.sampler, rival.detokenizer = sequence.sampler, sequence.detokenizer
    group = sequence.group
    group.sequences[group.sequences.index(sequence)] = rival
    return rival
