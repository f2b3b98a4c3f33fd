"""What was found best for a model: shape of the fast weights and update rule, kept as data."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeGuard

from ponderttt.adaptation.rules import UpdateRule
from ponderttt.errors import InvalidRequestError
from ponderttt.fast_weights.layout import LoRAConfig

_SHIPPED = files("ponderttt.adaptation") / "calibrations"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Shape of the fast weights, and what a gradient step on them is.

    Args:
        lora: the shape.
        rule: the step.
        provenance: what else the file says, such as `model`, `chunk_size` and `figures`: for
            which model and chunks it was found, and what was measured. Nothing depends on it.
    """

    lora: LoRAConfig = field(default_factory=LoRAConfig)
    rule: UpdateRule = field(default_factory=UpdateRule)
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Build from an object of JSON with `lora`, `rule` and anything else.

        Raises:
            InvalidRequestError: `lora` or `rule` is missing, or one of their values is unknown or
                out of range; `param` is its name.
        """
        for key in ("lora", "rule"):
            if not isinstance(values.get(key), Mapping):
                raise InvalidRequestError(key, "is not there, or is not an object; give {…}")
        return cls(
            _lora(values["lora"]),
            UpdateRule.from_dict(values["rule"]),
            {key: value for key, value in values.items() if key not in ("lora", "rule")},
        )

    def to_dict(self) -> dict[str, Any]:
        """As `from_dict` takes it, and as JSON gives it back: tuples are lists."""
        parts = {"lora": asdict(self.lora), "rule": asdict(self.rule)}
        for values in parts.values():
            values.update({k: list(v) for k, v in values.items() if isinstance(v, tuple)})
        return {**self.provenance, **parts}


def calibration_for(model_name: str) -> Calibration:
    """The calibration of an embedded model, or a careful default for any other."""
    # Looked up in the list, not opened: a name may hold slashes.
    for path in _SHIPPED.iterdir():
        if path.name == f"{model_name}.json":
            return Calibration.from_dict(json.loads(path.read_text(encoding="utf-8")))
    return Calibration()


def load_calibration(path: Path) -> Calibration:
    """Read a calibration from a file.

    Raises:
        InvalidRequestError: it can't be read, or a value is wrong; says which and where. `param`
            is `calibration`.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unusable(path, f"can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _unusable(path, f"is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise _unusable(path, "is not an object of JSON")
    try:
        return Calibration.from_dict(values)
    except InvalidRequestError as error:
        raise _unusable(path, f"has a wrong value: {error}") from error


def _unusable(path: Path, problem: str) -> InvalidRequestError:
    return InvalidRequestError("calibration", f"{path} {problem}")


def _lora(values: Mapping[str, Any]) -> LoRAConfig:
    known = {f.name for f in fields(LoRAConfig)}
    for key, value in values.items():
        if key not in known:
            raise InvalidRequestError(key, f"unknown; a shape has {sorted(known)}")
        if not _fits(key, value):
            raise InvalidRequestError(key, f"{value!r} does not fit; {_WANTED[key]}")
    targets = values.get("targets")
    return LoRAConfig(**{**values, "targets": tuple(targets)} if _is_list(targets) else values)


_WANTED = {
    "rank": "give a whole number",
    "alpha": "give a finite number",
    "layers": "give a whole number, or null for a quarter of the model",
    "targets": "give 'mlp', 'all' or a list of names",
    "seed": "give a whole number from 0 to 2**63 - 1",
}


def _fits(key: str, value: object) -> bool:
    match key:
        case "alpha":
            # A whole number of JSON may be too large for a float.
            return _is_number(value) and abs(value) <= sys.float_info.max
        case "layers":
            return value is None or _is_whole(value)
        case "targets":
            names = value if _is_list(value) else [value]
            return all(isinstance(name, str) for name in names)
        case "seed":
            return _is_whole(value) and 0 <= value < 2**63
        case _:
            return _is_whole(value)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, float) or _is_whole(value)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list | tuple)
