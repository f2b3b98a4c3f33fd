"""One session's reads and writes: by our decoder, and by transformers, PEFT and torch.optim."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.rules import UpdateRule
from ponderttt.adaptation.update import Write, Writer
from ponderttt.fast_weights.bank import AdapterBank, StepTag
from ponderttt.fast_weights.layout import AdapterLayout, LoRAConfig
from ponderttt.fast_weights.peft_format import export_adapter
from ponderttt.models.checkpoint import load_decoder
from ponderttt.models.kv_cache import KVCache
from tests.ponderttt import reference

#: The rule of a model that has none of its own; nothing is rolled back.
LENIENT = UpdateRule(learning_rate=1e-3, max_norm=1e6, loss_tolerance=1e6)


class World:
    """A decoder with its bank and writer."""

    def __init__(
        self, path: Path, rule: UpdateRule = LENIENT, *, slots: int = 6, **lora: Any
    ) -> None:
        self.path = path
        self.decoder = load_decoder(path)
        self.layout = AdapterLayout(
            self.decoder, LoRAConfig(**{"rank": 4, "alpha": 8.0, "layers": 2, **lora})
        )
        self.bank = AdapterBank(self.layout, slots, torch.device("cpu"), torch.float32)
        self.writer = Writer(self.decoder, self.bank, rule)

    def session(self, owner: str, tokens: Sequence[int]) -> Session:
        """A new session with fresh weights that will read `tokens`."""
        slot = self.bank.allocate(owner, self.bank.fresh_state(), 0)
        cache = self.decoder.new_cache(len(tokens))
        boundary = torch.zeros(len(tokens), self.decoder.config.hidden_size)
        return Session(self, owner, slot, list(tokens), cache, boundary)

    def learn(self, writes: Sequence[Write]) -> None:
        """All steps of all writes, the unfinished ones together; then commit what succeeded."""
        while active := [write for write in writes if not write.finished]:
            self.writer.step(active)
        for write in writes:
            if write.failure is None:
                self.bank.commit(write.tag, write.staged)


@dataclass
class Session:
    """One sequence of one session, read chunk by chunk as the engine does."""

    world: World
    owner: str
    slot: int
    tokens: list[int]
    cache: KVCache
    boundary: Tensor
    done: int = 0

    @torch.inference_mode()
    def read(self, end: int) -> None:
        """Prefill up to `end` with the present version of the weights; keep the boundary."""
        decoder, layout, bank = self.world.decoder, self.world.layout, self.world.bank
        count = end - self.done
        batch = decoder.batch([(self.cache, self.done, count)])
        x = decoder.embed(torch.tensor(self.tokens[self.done : end]), batch)
        x = decoder.run(x, 0, layout.first_layer, batch)
        self.boundary[self.done : end] = x
        adapter = bank.read([bank.tag(self.slot, self.owner)], [count])
        decoder.run(x, layout.first_layer, layout.last_layer, batch, adapter)
        self.done = self.cache.length = end

    def write(self, begin: int, end: int, action: Action = Action.UPDATE_1) -> Write:
        """A write of the chunk tokens[begin:end], its first token predicted from the one before."""
        start = max(begin - 1, 0)
        bank = self.world.bank
        return Write(
            tag=StepTag(self.slot, self.owner, bank.version(self.slot), "WRITE"),
            action=action,
            cache=self.cache,
            start=start,
            boundary=self.boundary[start : end - 1],
            targets=torch.tensor(self.tokens[start + 1 : end]),
            staged=bank.state(self.slot, self.owner),
        )


@dataclass
class PeftSession:
    """The same by transformers, PEFT and torch.optim, one session at a time."""

    layout: AdapterLayout
    rule: UpdateRule
    model: Any
    tokens: list[int]
    cache: Any = field(default_factory=DynamicCache)
    done: int = 0

    def __post_init__(self) -> None:
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self.a_matrices = [p for name, p in named.items() if ".lora_A." in name]
        self.fresh = [p.detach().clone() for p in self.parameters]
        self.optimiser = self._optimiser()

    def _optimiser(self) -> torch.optim.Optimizer:
        rule, rate = self.rule, self.rule.learning_rate
        match rule.optimizer:
            case "adam":
                betas = (rule.beta1, rule.beta2)
                return torch.optim.Adam(self.parameters, lr=rate, betas=betas, eps=rule.eps)
            case "sgd":
                return torch.optim.SGD(self.parameters, lr=rate, momentum=rule.beta1)
            case "muon":
                return torch.optim.Muon(
                    self.parameters, lr=rate, weight_decay=0.0, momentum=rule.beta1,
                    adjust_lr_fn="match_rms_adamw",
                )  # fmt: skip

    @classmethod
    def start(
        cls, stack: ExitStack, world: World, tokens: Sequence[int], directory: Path
    ) -> PeftSession:
        """A session with the world's fresh weights; the stack frees the model."""
        export_adapter(world.layout, world.bank.fresh_weights, directory, base_model="tiny")
        model = stack.enter_context(reference.hf_model(world.path))
        model = reference.with_peft_from(model, directory, trainable=True)
        return cls(world.layout, world.writer.rule, model, list(tokens))

    def read(self, end: int) -> None:
        """Prefill up to `end`."""
        with torch.no_grad():
            ids = torch.tensor([self.tokens[self.done : end]])
            self.model(ids, past_key_values=self.cache, use_cache=True)
        self.done = end

    def learn(self, begin: int, end: int, steps: int) -> list[float]:
        """Gradient steps on tokens[begin:end]; the loss before each, and after the last."""
        losses = []
        counts: slice | Tensor = slice(None)
        for step in range(steps):
            rows = self.row_losses(begin, end)
            losses.append(float(rows.detach().mean()))
            if step == 0 and self.rule.token_share < 1:
                number = max(1, round(self.rule.token_share * len(rows)))
                counts = rows.detach().argsort(descending=True)[:number]
            self.optimiser.zero_grad()
            rows[counts].mean().backward()
            for matrix in self.a_matrices if self.rule.freeze_a else ():
                matrix.grad.zero_()
            torch.nn.utils.clip_grad_norm_(self.parameters, self.rule.max_grad_norm)
            for group in self.optimiser.param_groups:
                group["lr"] = self.rule.learning_rate * self.rule.step_scales[step]
            self.optimiser.step()
            self._keep_near()
        with torch.no_grad():
            return [*losses, float(self.row_losses(begin, end).mean())]

    @torch.no_grad()
    def _keep_near(self) -> None:
        rule, pairs = self.rule, list(zip(self.parameters, self.fresh, strict=True))
        for parameter, fresh in pairs:
            parameter.sub_(rule.decay * (parameter - fresh))
        distance = sum(float((p - fresh).square().sum()) for p, fresh in pairs) ** 0.5
        if rule.trust_region is not None and distance > rule.trust_region:
            for parameter, fresh in pairs:
                parameter.copy_(fresh.lerp(parameter, rule.trust_region / distance))

    def row_losses(self, begin: int, end: int) -> Tensor:
        """[T] of tokens[begin:end], under the weights as they are."""
        start = max(begin - 1, 0)
        past = DynamicCache()
        for index, layer in enumerate(self.cache.layers if start else ()):
            past.update(layer.keys[..., :start, :], layer.values[..., :start, :], index)
        ids = torch.tensor([self.tokens[start : end - 1]])
        logits = self.model(ids, past_key_values=past, use_cache=True).logits[0]
        targets = torch.tensor(self.tokens[start + 1 : end])
        return F.cross_entropy(logits, targets, reduction="none")

    def flat(self, of: str = "weights") -> Tensor:
        """[P] weights, or a moment of Adam (`exp_avg`, `exp_avg_sq`), in the layout's order."""
        named = dict(self.model.named_parameters())
        pieces = []
        for entry in self.layout.entries:
            for matrix in "AB":
                suffix = f".{entry.layer}.{entry.module}.lora_{matrix}.default.weight"
                (parameter,) = (p for name, p in named.items() if name.endswith(suffix))
                value = parameter if of == "weights" else self.optimiser.state[parameter][of]
                pieces.append(value.detach().flatten())
        return torch.cat(pieces)
