"""Lanes as plain tensors and numbers, so that a run can be stopped between two steps.

The trunk's part is left out: it follows from the document alone and is computed again.
"""

from __future__ import annotations

from typing import Any

import torch

from ponderttt.engine.core import EngineCore
from ponderttt.fast_weights.bank import AdapterState
from training.rollouts.lanes import Lane, Lanes


def snapshot(core: EngineCore, lane: Lane) -> dict[str, Any]:
    """What a lane that has read a chunk needs to go on.

    Returns:
        Fast weights and moments [P]; keys and values of the adaptive blocks up to where the
        document is read; final hidden states of these positions; names of the chunks learned.
    """
    document = lane.document
    if document is None or document.final is None or lane.scores is None:
        raise RuntimeError("a lane can be kept once it has read a chunk")
    state = core.bank.state(lane.session.slot, lane.session.owner)
    first, end = core.bank.layout.first_layer, document.computed
    return {
        "position": lane.position,
        "weights": state.weights,
        "first": state.first,
        "second": state.second,
        "step": state.step,
        "learned": list(lane.session.learned),
        "keys": document.cache.keys[first:, :, :end].clone(),
        "values": document.cache.values[first:, :, :end].clone(),
        "final": document.final[:end].clone(),
    }


def restore(core: EngineCore, lanes: Lanes, lane: Lane, kept: dict[str, Any]) -> None:
    """Bring a lane that was just opened to where `snapshot` was called."""
    lane.position = int(kept["position"])
    state = AdapterState(kept["weights"], kept["first"], kept["second"], int(kept["step"]))
    lanes.adopt(lane, state)
    for key in kept["learned"]:
        lane.session.remember(key)
    document = lane.document = lanes.document(lane.episode, lane.span[0])
    if document.final is None:
        raise RuntimeError("a lane's document keeps its activations")
    first, end = core.bank.layout.first_layer, int(kept["keys"].shape[2])
    with torch.inference_mode():
        document.cache.keys[first:, :, :end] = kept["keys"]
        document.cache.values[first:, :, :end] = kept["values"]
        document.final[:end] = kept["final"]
    document.computed = document.cache.length = end
    lanes.score(lane)
