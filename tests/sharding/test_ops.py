"""Compiling DeepSpeed's op: locks, missing tools, one cache per environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sharding import ops
from sharding.errors import UserError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs need no compiled op")


def test_a_stale_lock_of_a_killed_build_does_not_hang() -> None:
    """torch waits for ever for its lock file, which a killed build leaves behind."""
    ops.prepare_ops(lambda text: None)
    lock = ops.cache_directory() / "deepspeed_shm_comm" / "lock"
    lock.touch()
    code = "from sharding.ops import prepare_ops; prepare_ops(print)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert not lock.exists()


def test_ninja_is_found_without_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    own = str(Path(sys.executable).parent)
    others = [part for part in os.environ["PATH"].split(os.pathsep) if part != own]
    monkeypatch.setenv("PATH", os.pathsep.join(others))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(ops.cache_directory()))
    ops.prepare_ops(lambda text: None)
    assert own in os.environ["PATH"].split(os.pathsep)


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.shutil, "which", lambda tool: None if tool == "c++" else f"/bin/{tool}")
    with pytest.raises(UserError, match=r"c\+\+"):
        ops.prepare_ops(lambda text: None)


def test_each_environment_has_its_own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    here = ops.cache_directory()
    monkeypatch.setattr(sys, "prefix", "/somewhere/else")
    assert ops.cache_directory() != here


def test_a_cache_that_cannot_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "ops"))
    with pytest.raises(UserError, match="TORCH_EXTENSIONS_DIR"):
        ops.prepare_ops(lambda text: None)
