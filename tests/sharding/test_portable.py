"""Checkpoints on disk: whole or not there, read tensor by tensor, checked before use."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from sharding import portable
from sharding.errors import UserError
from sharding.portable import Portable


def write(directory: Path, shard_bytes: int = portable.SHARD_BYTES) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint of random tensors, and these."""
    weights = {"a.weight": torch.randn(3, 4), "a.count": torch.randint(9, ()), "b.bias": torch.randn(5)}
    moments = {f"{which}.{name}": torch.randn(2, 2) for which in ("exp_avg", "exp_avg_sq") for name in "ab"}
    portable.write(directory, weights.items(), moments.items(), {"x": 1}, shard_bytes=shard_bytes)
    return weights, moments


@given(shard_bytes=st.integers(1, 200))
@settings(max_examples=20, deadline=None)
def test_what_is_written_is_read_however_it_is_cut(shard_bytes: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("root") / "step_00000007"
    weights, moments = write(directory, shard_bytes)
    opened = Portable(directory)
    assert opened.state == {"x": 1}
    kinds: dict[portable.Kind, dict[str, Tensor]] = {"model": weights, "optimizer": moments}
    for kind, tensors in kinds.items():
        assert opened.names(kind) == sorted(tensors)
        for name, value in opened.tensors(kind):
            assert torch.equal(value, tensors[name]) and value.dtype == tensors[name].dtype
            assert opened.shape(kind, name) == list(value.shape) and opened.dtype(kind, name) == value.dtype
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


FILES = (portable.part_name("model", 1, 1), portable.part_name("optimizer", 1, 1), portable.STATE)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named(name: str, damage: str, tmp_path: Path) -> None:
    write(tmp_path / "saved")
    path = tmp_path / "saved" / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(changed if damage == "flip" else content[:middle])
    with pytest.raises(UserError, match=name):
        Portable(tmp_path / "saved")


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        (None, "No such file"),
        ("", "Invalid JSON"),
        ("{}", "Field required"),
        ('{"format": "another/9", "files": {}}', "Input should be"),
        ('{"format": "dist-train-checkpoint/1", "files": {}}', "it lists no"),
        ('{"format": "dist-train-checkpoint/1", "files": {"../x": {"bytes": 1, "sha256": "0"}}}', "match pattern"),
    ],
)
def test_without_a_manifest_it_is_no_checkpoint(manifest: str | None, expected: str, tmp_path: Path) -> None:
    write(tmp_path / "saved")
    path = tmp_path / "saved/manifest.json"
    path.unlink() if manifest is None else path.write_text(manifest)
    with pytest.raises(UserError, match=f"not a complete checkpoint.*{expected}"):
        Portable(tmp_path / "saved")


def test_a_tensor_that_two_files_hold_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "saved")
    path = tmp_path / "saved"
    second = portable.part_name("model", 2, 2)
    save_file({"a.weight": torch.zeros(3, 4)}, path / second)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][second] = portable.seal(path / second).model_dump()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"holds a\.weight, which another file"):
        Portable(path)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(portable, "flush", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
