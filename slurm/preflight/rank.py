"""One rank of `dist-train preflight`: a preflight without a job after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dist_train.recipe import load_recipe
from dist_train.run_directory import RunDirectory
from sharding import world as worlds
from sharding.errors import UserErrors
from slurm.preflight.examine import preflight
from slurm.preflight.table import preflight_table


def run_preflight(world: worlds.World, recipe: Path, overrides: Sequence[str], run: RunDirectory) -> int:
    """Joins the world and examines it; rank 0 (or who stands in for it) prints the table. Returns the exit code.

    Raises:
        UserErrors: what speaks against training; empty on all other ranks.
    """
    settings = load_recipe(recipe, overrides)
    worlds.join(world, with_deepspeed=False)
    found = preflight(settings, run)
    speaks = world.rank == next(rank for rank in range(world.size) if rank not in found.silent)
    if speaks:
        Console().print(preflight_table(found, only_notes=True))
    if not found.good:
        raise UserErrors(found.errors() if speaks else [])
    return 0
