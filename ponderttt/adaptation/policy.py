"""The trained gate: a small network over the 32 features, and its file format.

A policy is a directory of `policy.safetensors` and `policy.json`; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ponderttt.adaptation.actions import Action, CostModelName
from ponderttt.adaptation.features import FEATURE_NAMES, FEATURE_VERSION
from ponderttt.adaptation.gates import Decision
from ponderttt.errors import PolicyFormatError

FORMAT_VERSION = 1
CONFIG_FILE = "policy.json"
WEIGHTS_FILE = "policy.safetensors"

#: Widest hidden layer; a damaged file must not ask for all memory.
MAX_HIDDEN = 4096


@dataclass(frozen=True, slots=True)
class PolicyMetadata:
    """What `policy.json` states.

    Args:
        base_model: name of the model whose chunks it was trained on.
        chunk_size: tokens per chunk in training.
        cost_model: in which costs its budget was counted.
        budgets: mean costs it was trained for, × forward.
        feature_mean, feature_std: normalisation of the 32 features.
        hidden_sizes: widths of the network's hidden layers.
        feature_version, format_version: must be this program's.
        training: provenance: command, seed, corpora.
        evaluation: figures on held-out repositories.
    """

    base_model: str
    chunk_size: int
    cost_model: str
    budgets: tuple[float, ...]
    feature_mean: tuple[float, ...]
    feature_std: tuple[float, ...]
    hidden_sizes: tuple[int, ...] = (64, 64)
    feature_version: int = FEATURE_VERSION
    format_version: int = FORMAT_VERSION
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)


class PolicyNetwork(nn.Module):
    """A trunk of tanh layers and a linear head: [B, 32] normalised features → [B, 4] logits."""

    def __init__(self, hidden_sizes: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = len(FEATURE_NAMES)
        for hidden in hidden_sizes:
            layers += [nn.Linear(width, hidden), nn.Tanh()]
            width = hidden
        self.trunk = nn.Sequential(*layers)
        self.actor = nn.Linear(width, len(Action))

    def forward(self, features: Tensor) -> Tensor:
        """[B, 32] → [B, 4]."""
        logits: Tensor = self.actor(self.trunk(features))
        return logits


class PolicyGate:
    """Serves a policy: the likeliest action among those that the budget allows.

    Args:
        network: the trained network.
        metadata: gives the normalisation.
    """

    def __init__(self, network: PolicyNetwork, metadata: PolicyMetadata) -> None:
        self.metadata = metadata
        self.network = network.eval().requires_grad_(False)
        self._mean = torch.tensor(metadata.feature_mean)
        self._std = torch.tensor(metadata.feature_std)

    @property
    def digest(self) -> str:
        """SHA-256 of all that its choices depend on: the weights and the normalisation."""
        found = hashlib.sha256()
        weights = self.network.state_dict()
        for name, tensor in (("mean", self._mean), ("std", self._std), *sorted(weights.items())):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            found.update(tensor.cpu().numpy().tobytes())
        return found.hexdigest()

    def logits(self, features: Tensor) -> Tensor:
        """[B, 32] raw features → [B, 4] logits."""
        normalised = ((features - self._mean) / self._std).clamp(-10.0, 10.0)
        return self.network(normalised)

    def choose(self, decision: Decision) -> Action:
        """The likeliest action that is allowed."""
        logits = self.logits(decision.features()[None])[0]
        return max(decision.allowed, key=lambda action: float(logits[action]))


def save_policy(directory: Path, network: PolicyNetwork, metadata: PolicyMetadata) -> None:
    """Write a policy directory."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()},
        directory / WEIGHTS_FILE,
    )
    text = json.dumps(asdict(metadata), indent=2)
    (directory / CONFIG_FILE).write_text(text + "\n")


def load_policy(directory: Path, base_model: str) -> PolicyGate:
    """Read and check a policy directory.

    Args:
        directory: holds `policy.json` and `policy.safetensors`.
        base_model: name of the model that is served.
    Raises:
        PolicyFormatError: for another model, feature version or format, or damaged; says which
            field differs.
    """
    metadata = read_metadata(directory)
    _expect("format_version", metadata.format_version, FORMAT_VERSION)
    _expect("feature_version", metadata.feature_version, FEATURE_VERSION)
    _expect("base_model", metadata.base_model, base_model)
    _check_values(metadata)
    network = PolicyNetwork(metadata.hidden_sizes)
    try:
        tensors = load_file(directory / WEIGHTS_FILE)
        network.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise PolicyFormatError(f"{directory / WEIGHTS_FILE}: cannot be read: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise PolicyFormatError(f"{WEIGHTS_FILE}: {name} has values that are not finite")
    return PolicyGate(network, metadata)


def _expect(field_name: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise PolicyFormatError(
            f"{CONFIG_FILE}: {field_name} is {found!r}, this server needs {wanted!r}"
        )


def _check_values(metadata: PolicyMetadata) -> None:
    sizes, mean, std = metadata.hidden_sizes, metadata.feature_mean, metadata.feature_std
    width = len(FEATURE_NAMES)
    kinds = get_args(CostModelName)
    for name, good, wanted in (
        ("chunk_size", _whole(metadata.chunk_size, 2**31), "must be a whole number above 0"),
        ("cost_model", metadata.cost_model in kinds, f"must be one of {', '.join(kinds)}"),
        ("budgets", _numbers(metadata.budgets), "must be finite numbers"),
        ("feature_mean", _numbers(mean, width), f"must be {width} finite numbers"),
        ("feature_std", _numbers(std, width), f"must be {width} finite numbers"),
        (
            "hidden_sizes",
            isinstance(sizes, tuple) and all(_whole(size, MAX_HIDDEN) for size in sizes),
            f"must be whole numbers in [1, {MAX_HIDDEN}]",
        ),
    ):
        if not good:
            raise PolicyFormatError(f"{CONFIG_FILE}: {name} {wanted}")
    # As float32, in which the features are divided by it.
    if not (torch.tensor(std) > 0).all():
        raise PolicyFormatError(f"{CONFIG_FILE}: feature_std must be above 0 throughout")


def _whole(value: object, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limit


def _numbers(values: object, count: int | None = None) -> bool:
    """Whether this is a list of (that many) numbers that are finite as float32."""
    if not isinstance(values, tuple) or count not in (None, len(values)):
        return False
    plain = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return plain and bool(torch.tensor(values, dtype=torch.float64).float().isfinite().all())


def read_metadata(directory: Path) -> PolicyMetadata:
    """What a policy directory states about itself; whether it fits is not checked.

    Raises:
        PolicyFormatError: damaged, or not of this format.
    """
    path = directory / CONFIG_FILE
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PolicyFormatError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise PolicyFormatError(f"{path}: not a JSON object")
    known = {f.name for f in fields(PolicyMetadata)}
    for key in values:
        if key not in known:
            raise PolicyFormatError(f"{path}: unknown field {key!r}")
    try:
        lists: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return PolicyMetadata(**lists)
    except TypeError as error:
        raise PolicyFormatError(f"{path}: {error}") from error
