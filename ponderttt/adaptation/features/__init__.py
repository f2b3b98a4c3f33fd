"""The 32 features by which a policy judges a chunk.

`FEATURE_NAMES` is the order of the vector. Formulas are in the docstrings of the functions of the
same names, one module per group. All features are finite, O(1), and depend on nothing but the
observation. A change of any formula or of the order needs a new `FEATURE_VERSION`, since a policy
is trained on one version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ponderttt.adaptation.features.activations import ACTIVATIONS
from ponderttt.adaptation.features.attention import ATTENTION
from ponderttt.adaptation.features.code import CODE
from ponderttt.adaptation.features.confidence import CONFIDENCE
from ponderttt.adaptation.features.group import FeatureGroup
from ponderttt.adaptation.features.history import HISTORY
from ponderttt.adaptation.features.sequence import SEQUENCE
from ponderttt.adaptation.observation import ChunkObservation
from ponderttt.errors import InvalidRequestError, ModelError

FEATURE_VERSION = 2

_GROUPS: tuple[FeatureGroup[Any], ...] = (
    CONFIDENCE,
    ACTIVATIONS,
    ATTENTION,
    CODE,
    HISTORY,
    SEQUENCE,
)

#: Feature names by group, for ablations and reports.
FEATURE_GROUPS: Mapping[str, tuple[str, ...]] = {group.name: group.names for group in _GROUPS}

#: Names of the 32 features, in the order of `extract`.
FEATURE_NAMES: tuple[str, ...] = tuple(name for group in _GROUPS for name in group.names)


def extract(obs: ChunkObservation) -> Tensor:
    """The features of one chunk.

    Args:
        obs: what was seen of the chunk; its tensors may be on any device.
    Returns:
        [32] float32 on the CPU, in the order of FEATURE_NAMES.
    Raises:
        InvalidRequestError: the chunk has no token.
        ModelError: a feature is not finite, which takes losses, activations, attention or a
            history that are not.
    """
    if obs.token_ids.shape[0] == 0:
        raise InvalidRequestError("token_ids", "0 tokens; a chunk has at least one")
    with np.errstate(invalid="ignore"):  # reported below, by name
        measured = [value for group in _GROUPS for value in group.values(obs)]
    values = torch.tensor(measured, dtype=torch.float32)
    finite = values.isfinite()
    if not bool(finite.all()):
        names = [
            name for name, good in zip(FEATURE_NAMES, finite.tolist(), strict=True) if not good
        ]
        raise ModelError(
            f"not finite: {', '.join(names)}; so the model's losses, activations or attention of "
            "this chunk are not: check the checkpoint and the session's fast weights"
        )
    return values
