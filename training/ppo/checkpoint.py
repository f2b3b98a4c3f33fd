"""Checkpoints: one safetensors file each, written all or not at all; nothing is pickled.

The tensors of a state go into the file as they are. All else is JSON in the file's metadata, with
`{"__tensor__": name}` where a tensor was, and a digest over both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ponderttt.errors import InvalidRequestError, PonderError
from training.ppo.environment import State

FORMAT = "ponderttt-ppo-checkpoint-1"
_MARK = "__tensor__"
_NAME = re.compile(r"iteration-(\d{6,})\.safetensors")


class CheckpointError(PonderError, ValueError):
    """A checkpoint that is damaged, or of another run."""


def checkpoint_path(directory: Path, iteration: int) -> Path:
    """Where the state after so many iterations is kept."""
    return directory / f"iteration-{iteration:06d}.safetensors"


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first; empty where there is no directory."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _name(path))]
    return [path for _, path in sorted(found)]


def save_checkpoint(path: Path, state: State) -> None:
    """Write a state, so that the file is either there whole or not at all.

    Args:
        path: of the file; its directory is made where needed.
        state: tensors and JSON values in dicts and lists; tuples come back as lists.
    Raises:
        InvalidRequestError: the state holds something else.
        OSError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    try:
        text = json.dumps(_pack(state, "", tensors), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError("state", f"cannot be kept as JSON: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    metadata = {"format": FORMAT, "state": text, "digest": _digest(text, tensors)}
    try:
        save_file(tensors, draft, metadata)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> State:
    """Read a state.

    Raises:
        CheckpointError: it cannot be read, is damaged, or is no checkpoint of this program.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise CheckpointError(f"{path}: format is {found!r}, this program needs {FORMAT!r}")
    text = metadata.get("state", "")
    if metadata.get("digest") != _digest(text, tensors):
        raise CheckpointError(f"{path}: damaged: its digest does not match; use an older one")
    state: State = _unpack(json.loads(text), tensors)
    return state


def _name(path: Path) -> re.Match[str] | None:
    return _NAME.fullmatch(path.name)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value with its tensors taken out, each under its path in the state."""
    if isinstance(value, Tensor):
        # A copy: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {_MARK: name}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key == _MARK:
                raise TypeError(f"the key {key!r} of {name or 'the state'} is not a usable string")
        return {key: _pack(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _MARK in value:
            return tensors[value[_MARK]]
        return {key: _unpack(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    return value


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).numpy().tobytes())
    return found.hexdigest()
