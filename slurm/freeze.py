"""A submission keeps what it was made with: code, resolved recipe and environment lie in the run directory, so that
later edits, upgrades of the checkout or another branch change nothing, however often the job is requeued.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from dist_train.recipe import Recipe, write_recipe
from dist_train.run_directory import REVISION, git_revision
from slurm.record import LaunchRecord

PACKAGES = ("dist_train", "sharding", "slurm", "tools")
SECRET = re.compile(
    r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL|AUTH", re.IGNORECASE
)  # of variables that are not written down


def freeze(record: LaunchRecord, recipe: Recipe) -> None:
    """Writes code, recipe and environment below DIR/slurm. A run that is submitted again takes today's code."""
    record.path.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, record.recipe)
    freeze_code(record.code, record.environment)


def freeze_code(code: Path, environment: Path) -> None:
    """Copies the code to one place, and writes what it runs in to another."""
    copy_code(code)
    environment.write_text(json.dumps(surroundings(os.environ), indent=1))


def copy_code(to: Path) -> None:
    """Copies the packages this process runs, whole or not at all."""
    source = Path(__file__).resolve().parent.parent
    if to.is_relative_to(source) and source.name == "code":  # submitted from frozen code itself
        return
    fresh = to.with_name(to.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    for package in PACKAGES:
        shutil.copytree(source / package, fresh / package, ignore=shutil.ignore_patterns("__pycache__"))
    (fresh / REVISION).write_text(git_revision() or "")
    shutil.rmtree(to, ignore_errors=True)
    fresh.rename(to)


def surroundings(environment: Mapping[str, str]) -> dict[str, object]:
    """Python, packages, and the environment variables without what looks like a secret."""
    return {
        "command": shlex.join(sys.argv),
        "directory": str(Path.cwd()),
        "host": platform.node(),
        "python": sys.executable,
        "python_version": platform.python_version(),
        "git": git_revision(),
        "packages": sorted({f"{d.name}=={d.version}" for d in importlib.metadata.distributions()}, key=str.lower),
        "variables": {key: value for key, value in sorted(environment.items()) if not SECRET.search(key)},
    }
