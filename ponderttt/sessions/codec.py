"""Fast weights and optimiser state as files: a PEFT adapter, and the moments beside it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ponderttt.errors import AdapterFormatError
from ponderttt.fast_weights.bank import AdapterState
from ponderttt.fast_weights.layout import AdapterLayout
from ponderttt.fast_weights.peft_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_config,
    adapter_weights,
    parse_adapter,
)
from ponderttt.sessions.record import LayoutRecord

OPTIMIZER_FILE = "optimizer.safetensors"

#: Everything that holds a state.
STATE_FILES = (CONFIG_FILE, WEIGHTS_FILE, OPTIMIZER_FILE)

_MOMENTS = ("first", "second")

# Sums of squares come out differently on other machines.
_NORM_SLACK = 1.001


class StateCodec:
    """States of one model's sessions, to bytes and back, bit for bit.

    Args:
        layout: of the vectors.
        fresh: [P], what a session begins with.
        model: name that the adapters state as their base.
        max_norm: L2 distance from fresh weights beyond which stored ones are refused.
    """

    def __init__(self, layout: AdapterLayout, fresh: Tensor, model: str, max_norm: float) -> None:
        self._layout = layout
        self._fresh = fresh.detach().cpu()
        self._max_norm = max_norm
        self._config = adapter_config(layout, model)
        self.model = model
        self.layout = LayoutRecord(
            rank=layout.config.rank,
            alpha=float(layout.config.alpha),
            first_layer=layout.first_layer,
            last_layer=layout.last_layer,
            modules=sorted({entry.module for entry in layout.entries}),
            size=layout.size,
            seed=layout.config.seed,
        )

    def encode(self, state: AdapterState) -> dict[str, bytes]:
        """The files of a state, by name. Moments that are zero are left out."""
        moments = {"first": state.first, "second": state.second}
        optimizer = {
            name: moment.detach().cpu().contiguous()
            for name, moment in moments.items()
            if bool(moment.any())
        }
        optimizer["step"] = torch.tensor([state.step])
        return {
            CONFIG_FILE: self._config,
            WEIGHTS_FILE: adapter_weights(self._layout, state.weights),
            OPTIMIZER_FILE: save(optimizer),
        }

    def decode(self, files: Mapping[str, bytes], where: str) -> AdapterState:
        """The state that the files hold, on the CPU.

        Args:
            files: as `encode` makes them.
            where: how messages name their directory.
        Raises:
            AdapterFormatError: a tensor is missing, misshapen, of another type, not finite or too
                far from fresh weights.
        """
        missing = set(STATE_FILES) - set(files)
        if missing:
            raise AdapterFormatError(f"{where}: {min(missing)} is missing")
        weights = parse_adapter(
            self._layout, files[CONFIG_FILE], files[WEIGHTS_FILE], self._fresh, where
        )
        distance = float((weights - self._fresh).norm())
        if distance > self._max_norm * _NORM_SLACK:
            raise AdapterFormatError(
                f"{where}: the weights lie {distance:.4g} from fresh ones, more than the "
                f"{self._max_norm:g} that updates may reach"
            )
        place = f"{where}/{OPTIMIZER_FILE}"
        try:
            tensors = load(files[OPTIMIZER_FILE])
        except (SafetensorError, ValueError, KeyError) as error:
            raise AdapterFormatError(f"{place}: cannot be read: {error}") from error
        step = tensors.pop("step", torch.empty(0))
        if step.dtype != torch.int64 or step.shape != (1,) or int(step) < 0:
            raise AdapterFormatError(f"{place}: step is not a count")
        unknown = set(tensors) - {"first", "second"}
        if unknown:
            raise AdapterFormatError(f"{place}: {min(unknown)} is not known here")
        first, second = (self._moment(tensors.get(name), name, place) for name in _MOMENTS)
        if bool((second < 0).any()):
            raise AdapterFormatError(f"{place}: second has values below 0")
        return AdapterState(weights, first, second, int(step))

    def _moment(self, tensor: Tensor | None, name: str, place: str) -> Tensor:
        if tensor is None:
            return torch.zeros_like(self._fresh)
        if tensor.dtype != self._fresh.dtype or tensor.shape != self._fresh.shape:
            raise AdapterFormatError(
                f"{place}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not "
                f"{self._fresh.dtype} of shape {tuple(self._fresh.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterFormatError(f"{place}: {name} has values that are not finite")
        return tensor
