"""Checkpoints that real DeepSpeed engines of two ranks write, once for all tests."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest

from sharding import portable
from tests.ranks import run_ranks
from tests.tools.convert.fixtures import convert, folders, made, refused, shards  # noqa: F401  fixtures
from tests.tools.convert.work_deepspeed import CASES
from tools.convert import deepspeed_native, deepspeed_universal
from tools.convert.held import Held

WORK = "tests.tools.convert.work_deepspeed"


@pytest.fixture(scope="session")
def seed() -> int:
    """Another one in each run."""
    return random.SystemRandom().randrange(10**6)


@pytest.fixture(scope="session")
def followed(tmp_path_factory: pytest.TempPathFactory, seed: int) -> tuple[Path, dict[str, Any]]:
    """Where the checkpoints lie, <case>/…, and the losses of the steps that followed them."""
    folder = tmp_path_factory.mktemp("deepspeed")
    return folder, run_ranks("save", 2, folder, module=WORK, seed=seed)


@pytest.fixture(scope="session")
def saved(followed: tuple[Path, dict[str, Any]]) -> Path:
    """Where the checkpoints lie."""
    return followed[0]


@pytest.fixture(scope="session")
def converted(saved: Path) -> dict[str, Held]:
    """Each checkpoint as it is read; beside it <case>/portable and <case>/ours, a universal one."""
    found = {}
    for case, settings in CASES.items():
        if settings["stage"]:
            held = found[case] = deepspeed_native.read(saved / case)
            with warnings.catch_warnings(record=True):
                deepspeed_universal.write(saved / case / "ours", held)
            weights = ((name, value) for name, value in held.weights if name not in held.state["frozen"])
            portable.write(saved / case / "portable", weights, held.moments, held.state)
    return found
