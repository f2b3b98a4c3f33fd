"""Where the first adaptive block looks.

Models park unused attention on the first token (the sink; Xiao et al., arXiv:2309.17453). It gets a
feature of its own and is left out of the others, which would otherwise repeat it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ponderttt.adaptation.features.group import FeatureGroup
from ponderttt.adaptation.observation import ChunkObservation

Floats = NDArray[np.float32]

#: Attention off the sink below which its shape is rounding noise.
LEAST_MASS = 1e-4
TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True, slots=True)
class AttentionView:
    """Attention of H heads at P probes; q is a probe's position in its sequence.

    The shape b is the attention on the tokens 1 … q, normalised to sum 1.

    P is 0 for a chunk of one token; the features are then 0.

    Args:
        sink: [H, P], attention on the sequence's first token.
        entropy: [H, P], entropy of b / log q, in [0, 1]; 0 where q < 2 or all is on the sink.
        reach: [H, P], Σ b · log(1 + distance) / log q, in [0, 1]; 0 as above.
    """

    sink: Floats
    entropy: Floats
    reach: Floats


def _view(obs: ChunkObservation) -> AttentionView:
    attention = obs.attention.numpy(force=True)
    probes = obs.probe_positions.numpy(force=True) + obs.start
    plogp, reach = (np.empty(attention.shape[:2], dtype=np.float32) for _ in range(2))
    # log(1 + distance) of the tokens 1 … q from probe q is the tail of one table.
    log_distance = np.log(np.arange(attention.shape[2], 0, -1, dtype=np.float32))
    # Probe by probe, so that the logarithms stay in the cache: several times as fast as at once.
    for index, probe in enumerate(probes.tolist()):
        rest = attention[:, index, 1 : probe + 1]
        plogp[:, index] = np.vecdot(rest, np.log(rest + TINY))
        reach[:, index] = np.vecdot(rest, log_distance[log_distance.size - probe :])

    mass = np.float32(1.0) - attention[:, :, 0]
    safe = np.maximum(mass, LEAST_MASS)
    scale = np.log(np.maximum(probes, 2)).astype(np.float32)
    shaped = (mass > LEAST_MASS) & (probes >= 2)
    return AttentionView(
        attention[:, :, 0],
        np.where(shaped, np.clip((np.log(safe) - plogp / safe) / scale, 0.0, 1.0), 0.0),
        np.where(shaped, np.clip(reach / safe / scale, 0.0, 1.0), 0.0),
    )


def _mean(values: Floats) -> float:
    """Mean; 0 where there is no probe."""
    return float(values.mean()) if values.size else 0.0


def attention_entropy(view: AttentionView) -> float:
    """Mean over heads and probes of H(b) / log q, in [0, 1]: focused (0) or spread out (1)."""
    return _mean(view.entropy)


def attention_reach(view: AttentionView) -> float:
    """Mean over heads and probes of Σ b · log(1 + distance) / log q, in [0, 1]: near or far."""
    return _mean(view.reach)


def attention_sink(view: AttentionView) -> float:
    """Mean attention on the sequence's first token, in [0, 1]: heads with nothing to look for."""
    return _mean(view.sink)


def head_disagreement(view: AttentionView) -> float:
    """Mean over probes of the standard deviation over heads of H(b) / log q, in [0, 0.5]."""
    return _mean(view.entropy.std(axis=0))


ATTENTION = FeatureGroup(
    name="attention",
    prepare=_view,
    features=(attention_entropy, attention_reach, attention_sink, head_disagreement),
)
