"""The write: gradient steps on the fast weights by replay of the adaptive blocks.

Serving keeps the hidden states at the trunk's top (the boundary activations) of every chunk, so a
write runs only the blocks above, with gradients, for several sessions at once; on a CPU, for no
more than have activations that stay in its caches. Each session's rows touch its own slot only, so
one backward yields every session's own gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.loss import gradient_at_top, losses_and_gradient, token_losses
from ponderttt.adaptation.observe import Scores
from ponderttt.adaptation.rules import UpdateRule
from ponderttt.fast_weights.adapter import BatchedAdapter
from ponderttt.fast_weights.bank import AdapterBank, AdapterState, StepTag
from ponderttt.fast_weights.muon import muon_rows
from ponderttt.fast_weights.optimizer import (
    adam_rows,
    clip_rows,
    decay_rows,
    project_rows,
    sgd_rows,
)
from ponderttt.models.attention import FlatBatch
from ponderttt.models.decoder import Decoder
from ponderttt.models.kv_cache import KVCache
from ponderttt.models.product import FrozenMatrix
from ponderttt.models.transfer import tensor_on

# Bytes: 256 tokens of a vocabulary of 150,000 are 155 MB.
_KEPT = 256 << 20

# Bytes of the widest activations that a batch of writes has on a CPU. Beyond, they fall out of its
# caches, which costs more than fewer calls save.
_WIDEST = 10 << 20

#: Tokens on which a write is judged at least, where it has so many.
_LEAST_JUDGED = 32
_JUDGED_RUNS = 4


@dataclass(frozen=True, slots=True)
class TopGradient:
    """What the head makes of a chunk's rows.

    Args:
        losses: [T] float32, nats.
        gradient: [T, hidden], of the mean loss with respect to the rows after the final norm.
    """

    losses: Tensor
    gradient: Tensor


def probabilities_fit(model: Decoder, rows: int) -> bool:
    """Whether a chunk's [rows, V] are few enough to be kept from its read to the decision."""
    return rows * model.config.vocab_size * torch.float32.itemsize <= _KEPT


def top_gradient(scores: Scores, head: FrozenMatrix, targets: Tensor) -> TopGradient | None:
    """From the probabilities that `score` kept, which are overwritten; None where it kept none."""
    if not scores.probabilities:
        return None
    weights = torch.full((len(targets),), 1.0 / len(targets), device=head.weight.device)
    pieces = [
        gradient_at_top(kept, head, targets[rows], weights[rows])
        for rows, kept in scores.probabilities
    ]
    return TopGradient(scores.losses, torch.cat(pieces))


@dataclass(slots=True)
class Write:
    """One chunk on its way into one owner's fast weights.

    The staged state is private to the write until it is committed: readers see the old version
    meanwhile, and a roll-back is to forget it.

    Args:
        tag: owner and the version that the write starts from.
        action: how many steps.
        cache: keys and values of the sequence; what lies before `start` is used as it is.
        start: position of the first replayed row; it predicts the token at start + 1.
        boundary: [T, hidden], boundary activations of positions start … start+T-1.
        targets: [T] int64, the tokens at start+1 … start+T.
        staged: a copy of the owner's state, changed step by step.
        emphasis: [T], factors on the gradients of the rows' losses; chosen at the first step
            where not all tokens count.
        before: [T], the rows' losses before the update; None until the first step.
        top: for the first step, from the read of the chunk by the same version, which saves the
            product with the vocabulary. The row that predicts the chunk's first token belongs to
            the chunk before and may have been read by an older version; the replay then differs
            from the read by that one position, which is left out of account.
    """

    tag: StepTag
    action: Action
    cache: KVCache
    start: int
    boundary: Tensor
    targets: Tensor
    staged: AdapterState
    steps_done: int = 0
    losses: list[float] = field(default_factory=list)
    failure: str | None = None
    emphasis: Tensor | None = None
    before: Tensor | None = None
    top: TopGradient | None = None

    @property
    def rows(self) -> int:
        """T."""
        return int(self.targets.shape[0])

    @property
    def finished(self) -> bool:
        """All steps taken, or given up."""
        return self.failure is not None or self.steps_done >= self.action.steps


class _Run(NamedTuple):
    """Rows offset … offset+rows-1 of a write, given by its index."""

    write: int
    offset: int
    rows: int


class Writer:
    """Takes gradient steps for batches of writes and judges the results.

    Args:
        model: frozen.
        bank: gives the layout and the fresh weights.
        rule: what a step is.
    """

    def __init__(self, model: Decoder, bank: AdapterBank, rule: UpdateRule) -> None:
        self._model = model
        self._bank = bank
        self._layout = bank.layout
        self.rule = rule
        linears = model.blocks[bank.layout.first_layer].linears()
        widest = max(sum(part.out_features for part in each.parts) for each in linears)
        cpu = model.device.type == "cpu"
        self._most_rows = _WIDEST // (widest * model.dtype.itemsize) if cpu else sys.maxsize

    def step(self, writes: Sequence[Write]) -> None:
        """One gradient step of each write, in few backwards; then judge those that are finished.

        Losses in nats per token are appended to each write: one per step, measured before it,
        and, once finished, the loss after the last. Where that is measured on some tokens only,
        it is the loss before plus what these tokens' losses have changed. A failure is noted
        in `failure`.
        """
        for batch in self._batches(writes):
            self._gradient_step(batch)
            finished = [write for write in batch if write.finished and write.failure is None]
            if finished:
                self._judge(finished)

    def _batches(self, writes: Sequence[Write]) -> Iterator[list[Write]]:
        """The writes in order, as many at once as are faster than one by one."""
        batch: list[Write] = []
        for write in writes:
            if batch and sum(each.rows for each in batch) + write.rows > self._most_rows:
                yield batch
                batch = []
            batch.append(write)
        if batch:
            yield batch

    def _gradient_step(self, writes: Sequence[Write]) -> None:
        staged = torch.stack([write.staged.weights for write in writes]).requires_grad_()
        # Whoever calls may have turned gradients off, as rollouts do.
        with torch.enable_grad():
            gradients, losses = self._gradients(writes, staged)
        with torch.no_grad():
            self._optimise(writes, staged.detach(), gradients)
        for write, rows in zip(writes, losses.split([w.rows for w in writes]), strict=True):
            write.losses.append(float(rows.mean()))
            write.before = rows if write.before is None else write.before
            write.steps_done += 1
            self._check_finite(write)

    def _gradients(self, writes: Sequence[Write], staged: Tensor) -> tuple[Tensor, Tensor]:
        """[N, P], of the tokens that count, and the losses of all rows."""
        normed, targets = self._replay(writes, staged)
        with torch.no_grad():
            losses, at_top = self._at_top(writes, normed.detach(), targets)
            if self.rule.token_share < 1.0:
                # A row's gradient at the top is its own, so others can be left out of it.
                at_top *= self._emphasis(writes, losses)[:, None]
        (gradients,) = torch.autograd.grad(normed, staged, at_top)
        return gradients, losses

    def _at_top(
        self, writes: Sequence[Write], normed: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses [N] and the gradient [N, hidden] at the top, of each write's mean loss."""
        sizes = [write.rows for write in writes]
        tops = {id(w): w.top for w in writes if w.top is not None and not w.steps_done}
        open_rows = [
            (rows, ids)
            for write, rows, ids in zip(
                writes, normed.split(sizes), targets.split(sizes), strict=True
            )
            if id(write) not in tops
        ]
        if open_rows:
            rows, ids = (torch.cat(part) for part in zip(*open_rows, strict=True))
            # The mean of each write by itself: no write's gradient depends on the others.
            weights = torch.cat(
                [torch.full((len(r),), 1.0 / len(r), device=rows.device) for r, _ in open_rows]
            )
            found = losses_and_gradient(rows, self._model.head, ids, weights)
            pieces = zip(
                *(part.split([len(r) for r, _ in open_rows]) for part in found), strict=True
            )
            missing = iter([TopGradient(*piece) for piece in pieces])
        each = [tops[id(write)] if id(write) in tops else next(missing) for write in writes]
        return torch.cat([t.losses for t in each]), torch.cat([t.gradient for t in each])

    def _emphasis(self, writes: Sequence[Write], losses: Tensor) -> Tensor:
        for write, rows in zip(writes, losses.split([w.rows for w in writes]), strict=True):
            if write.emphasis is None:
                count = max(1, round(self.rule.token_share * write.rows))
                hardest = rows.topk(count).indices
                write.emphasis = torch.zeros_like(rows)
                write.emphasis[hardest] = write.rows / count
        return torch.cat([write.emphasis for write in writes if write.emphasis is not None])

    def _optimise(self, writes: Sequence[Write], weights: Tensor, gradients: Tensor) -> None:
        rule, device = self.rule, weights.device
        if rule.freeze_a:
            for a, _ in self._layout.views(gradients).values():
                a.zero_()
        gradients = clip_rows(gradients, rule.max_grad_norm)
        first = torch.stack([write.staged.first for write in writes])
        second = torch.stack([write.staged.second for write in writes])
        rates = tensor_on(
            device, [rule.learning_rate * rule.step_scales[write.steps_done] for write in writes]
        )
        match rule.optimizer:
            case "adam":
                steps = tensor_on(device, [write.staged.step + 1 for write in writes])
                betas = (rule.beta1, rule.beta2)
                new, first, second = adam_rows(
                    weights, gradients, first, second, steps, rates, betas, rule.eps
                )
            case "sgd":
                new, first = sgd_rows(weights, gradients, first, rates, rule.beta1)
            case "muon":
                new, first = muon_rows(self._layout, weights, gradients, first, rates, rule.beta1)
        new = self._keep_near(new)
        for row, write in enumerate(writes):
            write.staged = AdapterState(new[row], first[row], second[row], write.staged.step + 1)

    def _keep_near(self, weights: Tensor) -> Tensor:
        """Towards the fresh weights, and into the trust region, where the rule says so."""
        rule, fresh = self.rule, self._bank.fresh_weights
        if rule.decay:
            weights = decay_rows(weights, fresh, rule.decay)
        if rule.trust_region is not None:
            weights = project_rows(weights, fresh, rule.trust_region)
        return weights

    def _check_finite(self, write: Write) -> None:
        state = write.staged
        tensors = (state.weights, state.first, state.second)
        # A NaN or infinity anywhere survives the sum of absolute values.
        finite = all(bool(t.abs().sum().isfinite()) for t in tensors)
        if not finite or not torch.tensor(write.losses).isfinite().all():
            write.failure = "not_finite"

    def _judge(self, writes: Sequence[Write]) -> None:
        runs = [run for index, write in enumerate(writes) for run in self._judged(index, write)]
        with torch.no_grad():
            staged = torch.stack([write.staged.weights for write in writes])
            normed, targets = self._replay(writes, staged, runs)
            losses = token_losses(normed, self._model.head, targets)
        after: list[list[Tensor]] = [[] for _ in writes]
        before: list[list[Tensor]] = [[] for _ in writes]
        for run, found in zip(runs, losses.split([run.rows for run in runs]), strict=True):
            known = writes[run.write].before
            if known is None:
                raise RuntimeError("a write is judged after its last step")
            after[run.write].append(found)
            before[run.write].append(known[run.offset : run.offset + run.rows])
        for write, new, old in zip(writes, after, before, strict=True):
            change = torch.cat(new).mean() - torch.cat(old).mean()
            # An estimate from few tokens may fall below what a loss can be.
            write.losses.append(max(0.0, write.losses[0] + float(change)))
            write.failure = self.verdict(write.losses, write.staged.weights)

    def _judged(self, index: int, write: Write) -> list[_Run]:
        """Some runs of rows, spread evenly; what lies between them need not be replayed.

        A run attends to what the read left of the rows before it, as all text to come does.
        """
        count = max(_LEAST_JUDGED, round(self.rule.judge_share * write.rows))
        if count >= write.rows:
            return [_Run(index, 0, write.rows)]
        rows = count // _JUDGED_RUNS
        # In the middle of its part each: a text's very first tokens are not like the others.
        middles = [(2 * n + 1) * write.rows // (2 * _JUDGED_RUNS) for n in range(_JUDGED_RUNS)]
        return [_Run(index, middle - rows // 2, rows) for middle in middles]

    def verdict(self, losses: Sequence[float], weights: Tensor) -> str | None:
        """Why an update must be rolled back: `not_finite`, `norm` or `loss`; None if it may stay.

        Args:
            losses: of the chunk, nats per token: the first before the update, the last after it.
            weights: [P], after the update.
        """
        if not torch.tensor(losses).isfinite().all():
            return "not_finite"
        if float((weights - self._bank.fresh_weights).norm()) > self.rule.max_norm:
            return "norm"
        if losses[-1] > losses[0] + self.rule.loss_tolerance:
            return "loss"
        return None

    def _replay(
        self, writes: Sequence[Write], staged: Tensor, runs: Sequence[_Run] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Adaptive blocks over the boundary activations: normed [N, hidden], targets [N].

        `runs`: the rows that are wanted; None: all of every write.
        """
        model = self._model
        if runs is None:
            runs = [_Run(index, 0, write.rows) for index, write in enumerate(writes)]
        of = [writes[run.write] for run in runs]
        segments = [(w.cache, w.start + r.offset, r.rows) for w, r in zip(of, runs, strict=True)]
        batch: FlatBatch = model.batch(segments, replay=True)
        adapter = BatchedAdapter(
            self._layout.views(staged),
            [run.write for run in runs],
            [run.rows for run in runs],
            self._layout.config.scale,
        )
        rows = [slice(run.offset, run.offset + run.rows) for run in runs]
        x = torch.cat([w.boundary[r] for w, r in zip(of, rows, strict=True)])
        x = model.run(x, self._layout.first_layer, self._layout.last_layer, batch, adapter)
        targets = torch.cat([w.targets[r] for w, r in zip(of, rows, strict=True)])
        return model.normed(x), targets
