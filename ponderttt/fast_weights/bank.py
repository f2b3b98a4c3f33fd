"""The bank: fast weights of many sessions in one tensor, each slot with one owner."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ponderttt.fast_weights.adapter import BatchedAdapter
from ponderttt.fast_weights.layout import AdapterLayout
from ponderttt.models.transfer import moved

#: The slot that holds zeros and has no owner: reading it adapts nothing.
BASE_SLOT = 0


@dataclass(frozen=True, slots=True)
class StepTag:
    """Who reads or writes which version in one row group of an engine step."""

    slot: int
    owner: str | None
    version: int
    mode: Literal["READ", "WRITE"] = "READ"


class OwnershipError(RuntimeError):
    """A step named a slot that belongs to somebody else, or another version of it: a bug."""


@dataclass(slots=True)
class AdapterState:
    """Fast weights and optimiser moments of one owner, each [P], and the steps taken so far."""

    weights: Tensor
    first: Tensor
    second: Tensor
    step: int = 0

    def clone(self) -> AdapterState:
        """A copy that shares nothing."""
        return AdapterState(
            self.weights.clone(), self.first.clone(), self.second.clone(), self.step
        )

    def to(self, device: torch.device) -> AdapterState:
        """The same on another device."""
        return AdapterState(
            self.weights.to(device), self.first.to(device), self.second.to(device), self.step
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the three vectors."""
        return sum(t.numel() * t.element_size() for t in (self.weights, self.first, self.second))

    def digest(self) -> str:
        """SHA-256 of the weights, in hexadecimal."""
        # As bytes first: numpy knows no bfloat16.
        raw = self.weights.detach().cpu().contiguous().view(torch.uint8)
        return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


class AdapterBank:
    """Slots of fast weights with optimiser state; slot 0 is zeros and owned by nobody.

    Args:
        layout: of each slot's flat vector of P numbers.
        slots: how many owners fit at once.
        device, dtype: of the bank.
    """

    def __init__(
        self, layout: AdapterLayout, slots: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.layout = layout
        self.fresh_weights = layout.fresh(device, dtype)
        shape = (slots + 1, layout.size)
        self._weights = torch.zeros(shape, device=device, dtype=dtype)
        self._first = torch.zeros(shape, device=device, dtype=dtype)
        self._second = torch.zeros(shape, device=device, dtype=dtype)
        self._steps = [0] * (slots + 1)
        self._owners: list[str | None] = [None] * (slots + 1)
        self._versions = [0] * (slots + 1)
        self._free = list(range(slots, BASE_SLOT, -1))
        self._matrices = layout.views(self._weights)

    @property
    def capacity(self) -> int:
        """Slots in all, the base slot not counted."""
        return len(self._owners) - 1

    @property
    def occupied(self) -> int:
        """Slots in use."""
        return self.capacity - len(self._free)

    @property
    def has_room(self) -> bool:
        """Whether `allocate` would succeed."""
        return bool(self._free)

    def fresh_state(self) -> AdapterState:
        """What a session that has learned nothing holds."""
        zeros = torch.zeros_like(self.fresh_weights)
        return AdapterState(self.fresh_weights.clone(), zeros, zeros.clone())

    def allocate(self, owner: str, state: AdapterState, version: int) -> int:
        """Put an owner's state into a free slot and return the slot.

        Raises:
            OwnershipError: no slot is free, or the owner holds one already.
        """
        if owner in self._owners:
            raise OwnershipError(f"{owner!r} holds slot {self._owners.index(owner)} already")
        if not self._free:
            raise OwnershipError(f"all {self.capacity} slots are in use")
        slot = self._free.pop()
        self._owners[slot] = owner
        self._store(slot, state, version)
        return slot

    def release(self, slot: int, owner: str) -> AdapterState:
        """Take the state out of the slot, wipe it and free it."""
        state = self.state(slot, owner)
        self._owners[slot] = None
        for tensor in (self._weights, self._first, self._second):
            tensor[slot].zero_()
        self._free.append(slot)
        return state

    def state(self, slot: int, owner: str) -> AdapterState:
        """A copy of the owner's state."""
        self._check_owner(slot, owner)
        return AdapterState(
            self._weights[slot].clone(),
            self._first[slot].clone(),
            self._second[slot].clone(),
            self._steps[slot],
        )

    def version(self, slot: int) -> int:
        """Version of the weights in the slot."""
        return self._versions[slot]

    def tag(self, slot: int, owner: str | None) -> StepTag:
        """What a read of the slot by `owner` sees from now until the next commit."""
        return StepTag(slot, owner, self._versions[slot])

    def read(self, tags: Sequence[StepTag], lengths: Sequence[int]) -> BatchedAdapter | None:
        """The adapter for a flat batch whose segment i is read as `tags[i]`.

        Returns:
            None where no row adapts.
        Raises:
            OwnershipError: a tag names a slot of somebody else or an outdated version.
        """
        for tag in tags:
            self._check(tag)
        slots = [tag.slot for tag in tags]
        if all(slot == BASE_SLOT for slot in slots):
            return None
        return BatchedAdapter(self._matrices, slots, lengths, self.layout.config.scale)

    def commit(self, tag: StepTag, state: AdapterState) -> int:
        """Replace the owner's state by what a write made of version `tag.version`.

        Returns:
            The new version.
        Raises:
            OwnershipError: the slot has another owner, or has moved on to another version; the
                tag is one of a read, or of a slot that nobody owns.
        """
        if tag.mode != "WRITE" or tag.owner is None:
            raise OwnershipError(f"{tag} does not allow a write")
        self._check(tag)
        self._store(tag.slot, state, tag.version + 1)
        return tag.version + 1

    def _store(self, slot: int, state: AdapterState, version: int) -> None:
        device = self._weights.device
        self._weights[slot].copy_(moved(state.weights, device))
        self._first[slot].copy_(moved(state.first, device))
        self._second[slot].copy_(moved(state.second, device))
        self._steps[slot] = state.step
        self._versions[slot] = version

    def _check_owner(self, slot: int, owner: str | None) -> None:
        if self._owners[slot] != owner:
            raise OwnershipError(f"slot {slot} belongs to {self._owners[slot]!r}, not to {owner!r}")

    def _check(self, tag: StepTag) -> None:
        self._check_owner(tag.slot, tag.owner)
        if self._versions[tag.slot] != tag.version:
            raise OwnershipError(
                f"slot {tag.slot} is at version {self._versions[tag.slot]}, not {tag.version}"
            )
