"""Small random corpora, and disks that refuse: used by the tests of shards and streams."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sharding.shard_writer import pack_sample, write_dataset
from sharding.shards import Dims

LABELS = (-3.0, 3.0)
NO_MOUNT = "runs as root, whom no mode binds, and cannot mount read-only"


def random_sample(rng: np.random.Generator, key: str, *, vision_width: int = 5) -> dict[str, Any]:
    """Arguments of `pack_sample`; each modality absent in a fifth of the samples."""
    here = rng.random(5) > 0.2
    return {
        "key": key,
        "label": round(float(rng.uniform(*LABELS)), 3),
        "audio": rng.integers(-32768, 32768, rng.integers(400, 900)).astype(np.float32) / 32768 if here[0] else None,
        "text": "naïve „Wörter“ " * int(rng.integers(1, 4)) if here[1] else None,
        "text_features": rng.normal(size=(rng.integers(1, 9), 7)).astype(np.float32) if here[2] else None,
        "simulated": rng.normal(size=(rng.integers(1, 9), 7)).astype(np.float32) if here[4] else None,
        "vision": rng.normal(size=(rng.integers(1, 9), vision_width)).astype(np.float32) if here[3] else None,
    }


def write_corpus(out: Path, samples: list[dict[str, Any]], samples_per_shard: int, split: Any = "train") -> None:
    dims = Dims(audio="waveform", text=7, simulated=7, vision=5)
    with write_dataset(out, dims=dims, label_range=LABELS, samples_per_shard=samples_per_shard) as writer:
        for sample in samples:
            writer.add(split, pack_sample(split=split, **sample))


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A directory with `size` bytes of room: a tmpfs where it can be mounted, else a limit on each file's size."""
    folder.mkdir()
    if _mount("-t", "tmpfs", "-o", f"size={size}", "none", str(folder)):
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def forbidden_directory(folder: Path) -> Iterator[Path]:
    """A directory in which nothing can be made."""
    folder.mkdir()
    with read_only(folder):
        yield folder


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Lets nothing be made in a directory: by its mode, or for root by a read-only mount (else skips the test).

    As root the files below it cannot be changed either.
    """
    folder.chmod(0o555)
    try:
        if not _can_make(folder / "probe"):
            yield
            return
        if not _mount("--bind", str(folder), str(folder)):
            pytest.skip(NO_MOUNT)
        try:
            deadline = time.monotonic() + 10
            while not _mount("-o", "remount,bind,ro", str(folder)):  # busy while another process writes there
                if time.monotonic() > deadline:
                    pytest.skip(NO_MOUNT)
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    finally:
        folder.chmod(0o755)


def _can_make(folder: Path) -> bool:
    try:
        folder.mkdir()
    except OSError:
        return False
    folder.rmdir()
    return True


def _mount(*arguments: str) -> bool:
    try:
        return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
