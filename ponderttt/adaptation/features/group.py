"""What the six feature modules have in common: a preparation shared by a few features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ponderttt.adaptation.observation import ChunkObservation

View = TypeVar("View")


@dataclass(frozen=True, slots=True)
class FeatureGroup(Generic[View]):
    """Features of one kind, computed from one view of the observation.

    Args:
        name: the group, as ablations name it.
        prepare: turns an observation into what the features of the group share.
        features: one function per feature; its name is the feature's name.
    """

    name: str
    prepare: Callable[[ChunkObservation], View]
    features: tuple[Callable[[View], float], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Feature names in the order of `values`."""
        return tuple(feature.__name__ for feature in self.features)

    def values(self, obs: ChunkObservation) -> list[float]:
        """The group's features of one chunk."""
        view = self.prepare(obs)
        return [feature(view) for feature in self.features]
