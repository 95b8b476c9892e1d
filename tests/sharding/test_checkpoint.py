"""Checkpoints on disk: whole or not there, and checked before use."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sharding import checkpoint
from sharding.errors import UserError


def write(root: Path, step: int, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    directory = root / f"step_{step:08d}"
    weights, moments = {"layer.weight": torch.randn(3, 4)}, {"exp_avg.layer.weight": torch.randn(3, 4)}
    checkpoint.write(directory, weights, moments, {"x": 1})
    return directory


def test_round_trip(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, bias=False)
            self.frozen = nn.Linear(2, 2).requires_grad_(False)

    directory = write(tmp_path, 5, seed=9)
    assert checkpoint.read_state(directory) == {"x": 1}
    model = Model()
    checkpoint.load_weights(model, directory)
    torch.manual_seed(9)
    assert torch.equal(model.layer.weight, torch.randn(3, 4))
    model.layer = nn.Linear(4, 2, bias=False)
    with pytest.raises(UserError, match=r"layer\.weight has shape"):
        checkpoint.load_weights(model, directory)
    model.extra = nn.Linear(1, 1)
    with pytest.raises(UserError, match="other parameters"):
        checkpoint.load_weights(model, directory)


@pytest.mark.parametrize("name", checkpoint.FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named(name: str, damage: str, tmp_path: Path) -> None:
    directory = write(tmp_path, 1)
    content = (directory / name).read_bytes()
    if damage == "remove":
        (directory / name).unlink()
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        (directory / name).write_bytes(changed if damage == "flip" else content[:middle])
    with pytest.raises(UserError, match=name):
        checkpoint.read_state(directory)


def test_without_manifest_it_is_no_checkpoint(tmp_path: Path) -> None:
    directory = write(tmp_path, 1)
    (directory / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoint.read_state(directory)


def test_a_failed_write_leaves_nothing_and_earlier_ones_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write(tmp_path, 1)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "flush", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == [before.name]
    checkpoint.read_state(before)


def test_pruning_keeps_the_newest_and_what_pointers_name(tmp_path: Path) -> None:
    for step in range(1, 7):
        write(tmp_path, step)
    checkpoint.point(tmp_path / "best", "step_00000002")
    checkpoint.point(tmp_path / "best", "step_00000001")
    checkpoint.point(tmp_path / "last", "step_00000006")
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == [f"step_0000000{step}" for step in (1, 4, 5, 6)]
    assert json.loads((tmp_path / "best" / "state.json").read_text()) == {"x": 1}


def test_fingerprint_sees_every_frozen_bit_and_no_trainable() -> None:
    frozen, trained = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3)
    model = nn.Sequential(frozen, trained)
    before = checkpoint.fingerprint(model)
    nn.init.zeros_(trained.weight)
    assert checkpoint.fingerprint(model) == before
    with torch.no_grad():
        frozen.weight[2, 1].add_(1e-3)
    assert checkpoint.fingerprint(model) != before
