"""How sure the model was of the chunk, and how right."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ponderttt.adaptation.features.group import FeatureGroup
from ponderttt.adaptation.observation import ChunkObservation


def _array(values: Tensor) -> NDArray[np.float64]:
    return values.numpy(force=True).astype(np.float64)


def mean_loss(obs: ChunkObservation) -> float:
    """log(1 + mean loss): difficulty of the chunk; the loss is the log of its perplexity.

    Mean over the chunk's losses in nats; 0 where nothing was predicted.
    """
    losses = _array(obs.losses)
    return math.log1p(losses.mean()) if losses.size else 0.0


def loss_trend(obs: ChunkObservation) -> float:
    """log((1 + mean loss of the second half) / (1 + mean loss of the first)).

    Negative where reading the chunk helps to predict it. With an odd number of losses the middle
    one is in the second half; 0 with fewer than two. (The spread or tail of the losses nearly
    repeats their mean.)
    """
    losses = _array(obs.losses)
    half = losses.size // 2
    if not half:
        return 0.0
    return math.log1p(losses[half:].mean()) - math.log1p(losses[:half].mean())


def mean_entropy(obs: ChunkObservation) -> float:
    """Mean entropy at the probes / log V, in [0, 1]: how undecided the model is.

    0 where there is no probe.
    """
    entropy = _array(obs.probe_entropy)
    return float(entropy.mean()) / math.log(max(obs.vocab_size, 2)) if entropy.size else 0.0


def overconfidence(obs: ChunkObservation) -> float:
    """Mean top-1 at the probes - mean exp(-loss), in [-1, 1]: sure, but is it right?

    The mean top-1 probability alone nearly repeats the entropy. What it adds is its distance to
    the probability that the tokens which came were given: about 0 on text like the training
    text, positive where the model is sure and wrong. 0 where there is no loss or no probe.
    """
    losses, top1 = _array(obs.losses), _array(obs.probe_top1)
    if not losses.size or not top1.size:
        return 0.0
    return float(top1.mean() - np.exp(-losses).mean())


CONFIDENCE = FeatureGroup(
    name="confidence",
    prepare=lambda obs: obs,
    features=(mean_loss, loss_trend, mean_entropy, overconfidence),
)
