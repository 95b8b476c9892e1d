"""Checkpoints for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sharding.retention import step_directory
from sharding.saver import CheckpointSettings, Saver


def save(engine: Any, root: Path, step: int, state: dict[str, Any] | None = None, *pointers: str) -> Path:
    """Saves what the engine holds and waits until it is there (collective)."""
    saver = Saver(root, CheckpointSettings(asynchronous=False), {})
    saver.save(engine, step, state or {}, pointers)
    return step_directory(root, step)
