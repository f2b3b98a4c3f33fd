"""Shape of the hidden states at the trunk's top and after the final norm.

Every statistic is taken token by token and only then averaged: the first token of a sequence has
activations a hundred times larger than the others in most models (Sun et al., arXiv:2402.17762)
and would otherwise be all that these features see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ponderttt.adaptation.features.group import FeatureGroup
from ponderttt.adaptation.observation import ChunkObservation

Floats = NDArray[np.float32]

SPARSE_BELOW = 0.1
#: Mean square that stands for zero in quotients and logarithms.
SMALLEST = np.float32(1e-12)
#: Magnitude whose fourth power, summed over any width, is still far from the end of float32.
LARGEST = 1e8
#: Tokens read at once, few enough for their states and squares to stay in the cache.
BLOCK = 64


@dataclass(frozen=True, slots=True)
class ActivationView:
    """Statistics of each of T tokens over the width of the model.

    Args:
        width: hidden size.
        log_rms: [T], natural log of the boundary's root mean square.
        offset: [T], mean / rms of the boundary.
        sparse: [T // 64, rounded up], boundary values with |x| < 0.1 · rms, by blocks of tokens.
        log_kurtosis: [T], log(mean x⁴ / (mean x²)²) of the final states.
        neighbour: [T-1], cosine between the boundary states of a token and the next.
        depth: [T], cosine between boundary and final state.
    """

    width: int
    log_rms: Floats
    offset: Floats
    sparse: Floats
    log_kurtosis: Floats
    neighbour: Floats
    depth: Floats


def _in_range(states: Floats) -> tuple[Floats, float]:
    """States whose fourth powers are finite, and the number by which they were divided."""
    peak = float(np.abs(states).max())
    return (states, 1.0) if peak <= LARGEST else (states / np.float32(peak), peak)


def _row_dot(left: Floats, right: Floats) -> Floats:
    """[n] mean over the width of the products of two arrays [n, hidden]."""
    products: Floats = np.vecdot(left, right) / np.float32(left.shape[1])
    return products


def _rms(states: Floats) -> Floats:
    return np.sqrt(np.maximum(_row_dot(states, states), SMALLEST))


def _block(boundary: Floats, final: Floats) -> tuple[Floats, ...]:
    """The arrays of the view for n tokens; `boundary` has the token after them, if there is one."""
    (around, scale), (top, _) = _in_range(boundary), _in_range(final)
    around_rms, top_rms = _rms(around), _rms(top)
    base, rms = around[: top.shape[0]], around_rms[: top.shape[0]]
    squares = np.square(top)
    kurtosis = _row_dot(squares, squares) / np.square(np.square(top_rms))
    sparse = np.count_nonzero(np.abs(base) < np.float32(SPARSE_BELOW) * rms[:, None])
    return (
        np.log(rms) + np.float32(math.log(scale)),
        base.mean(axis=1) / rms,
        np.array([sparse], dtype=np.float32),
        np.log(np.maximum(kurtosis, 1.0)),
        _row_dot(around[1:], around[:-1]) / around_rms[1:] / around_rms[:-1],
        _row_dot(base, top) / rms / top_rms,
    )


def _view(obs: ChunkObservation) -> ActivationView:
    boundary, final = obs.boundary.numpy(force=True), obs.final.numpy(force=True)
    blocks = [
        _block(boundary[first : first + BLOCK + 1], final[first : first + BLOCK])
        for first in range(0, final.shape[0], BLOCK)
    ]
    return ActivationView(boundary.shape[1], *map(np.concatenate, zip(*blocks, strict=True)))


def activation_spread(view: ActivationView) -> float:
    """q90 - q10 over tokens of log rms(boundary): do the tokens differ in weight?

    Quantiles with linear interpolation; 0 if T = 1. The level of the rms is nearly a constant of
    the model.
    """
    ordered = np.sort(view.log_rms)
    last = ordered.size - 1
    low, high = np.interp((0.1 * last, 0.9 * last), np.arange(ordered.size), ordered)
    return float(high - low)


def activation_offset(view: ActivationView) -> float:
    """Mean over tokens of √hidden · mean(boundary) / rms(boundary).

    The mean in units of what noise of that rms would show, so about 1 whatever the width.
    """
    return float(view.offset.mean()) * view.width**0.5


def activation_sparsity(view: ActivationView) -> float:
    """Share of boundary values with |x| < 0.1 · rms of their token, in [0, 1]."""
    return float(view.sparse.sum()) / (view.width * view.log_rms.size)


def final_kurtosis(view: ActivationView) -> float:
    """Mean over tokens of log(mean x⁴ / (mean x²)²) of the final states; 0 = all alike.

    Of the final states, since at the boundary the kurtosis nearly repeats the sparsity.
    """
    return float(view.log_kurtosis.mean())


def neighbour_cosine(view: ActivationView) -> float:
    """Mean cosine between the boundary states of neighbouring tokens, in [-1, 1]; 0 if T = 1."""
    return float(view.neighbour.mean()) if view.neighbour.size else 0.0


def refinement(view: ActivationView) -> float:
    """Mean over tokens of 1 - cos(boundary, final), in [0, 2]: what the adaptive top changes."""
    return 1.0 - float(view.depth.mean())


ACTIVATIONS = FeatureGroup(
    name="activations",
    prepare=_view,
    features=(
        activation_spread,
        activation_offset,
        activation_sparsity,
        final_kurtosis,
        neighbour_cosine,
        refinement,
    ),
)
