"""Checkpoint files: what goes in comes out, and what is damaged is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ponderttt.errors import InvalidRequestError
from training.ppo import checkpoint
from training.ppo.checkpoint import (
    CheckpointError,
    checkpoint_path,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
)

STATE: dict[str, Any] = {
    "numbers": [1, 0.1, -1e300, True, None, "text"],
    "deep": {"a": {"b": torch.tensor([[1.5, -0.0]])}, "empty": {}, "list": []},
    "rows": [torch.arange(3), {"flag": torch.tensor(True)}],
    "wide": torch.tensor(2.0, dtype=torch.float64),
    "generator": torch.Generator().manual_seed(1).get_state(),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) and type(a) is type(b)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = checkpoint_path(tmp_path, 7)
    save_checkpoint(path, STATE)
    return path


def test_state_saved_and_loaded_is_the_same_and_the_only_file(saved: Path) -> None:
    assert same(STATE, load_checkpoint(saved))
    assert list(saved.parent.iterdir()) == [saved]


def test_state_with_tensors_that_share_memory_is_saved(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    save_checkpoint(tmp_path / "x", {"a": shared, "b": shared[1:]})
    assert load_checkpoint(tmp_path / "x")["b"].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("value", [{1: 2}, float("nan"), {1, 2}, {"__tensor__": 1}, Path("x")])
def test_state_that_json_cannot_hold_is_refused_and_nothing_written(
    tmp_path: Path, value: Any
) -> None:
    with pytest.raises(InvalidRequestError, match="state"):
        save_checkpoint(tmp_path / "x", {"value": value})
    assert list(tmp_path.iterdir()) == []


def test_write_that_fails_half_way_keeps_the_old_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", torn)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(saved, {"other": 1})
    assert same(STATE, load_checkpoint(saved))
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_checkpoint_cut_short_is_refused(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(saved)


def test_checkpoint_with_one_bit_flipped_is_refused_wherever_it_is(saved: Path) -> None:
    content = saved.read_bytes()
    for at in range(0, len(content), 97):
        flipped = bytearray(content)
        flipped[at] ^= 1
        saved.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            load_checkpoint(saved)


def test_checkpoint_of_something_else_is_refused_by_its_format(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="format is None, this program needs 'ponderttt-ppo"):
        load_checkpoint(tmp_path / "x")


def test_checkpoint_that_is_missing_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")


def test_checkpoints_of_a_directory_come_in_order_and_without_strangers(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "none") == []
    names = [checkpoint_path(tmp_path, number) for number in (9, 10, 1_000_000, 2)]
    for path in (*names, tmp_path / ".iteration-000003.safetensors.17", tmp_path / "notes"):
        path.touch()
    assert checkpoints(tmp_path) == [names[3], names[0], names[1], names[2]]
