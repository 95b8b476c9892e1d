"""Does the recipe fit the ranks, the data and the GPUs it is submitted to? Asked before anything is queued."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dist_train.build import fit_to_dataset, open_splits
from dist_train.plan import Planner, plan_as_is
from dist_train.plan_corpus import corpus_of, load_of
from dist_train.recipe import Recipe, load_recipe
from dist_train.world_size import check_world_size
from sharding.errors import UserError
from sharding.hardware import GIB, Hardware, load_hardware
from slurm.settings import LaunchSettings


def check_recipe(path: Path, overrides: Sequence[str], settings: LaunchSettings) -> Recipe:
    """The recipe, for every number of nodes the job may get.

    Raises:
        UserError, UserErrors: it is wrong, or data and ranks do not fit.
    """
    return check_fit(load_recipe(path, overrides), settings)


def check_fit(recipe: Recipe, settings: LaunchSettings) -> Recipe:
    """The recipe with the dataset's feature widths.

    Raises:
        UserError, UserErrors: data and ranks do not fit.
    """
    recipe = fit_to_dataset(recipe)
    clips = len(open_splits(recipe)["train"])
    most = settings.node_counts[1] * settings.ranks
    check_world_size(recipe.data.path, clips, most, batch=recipe.data.batch, accumulation=recipe.training.accumulation)
    return recipe


def check_memory(recipe: Recipe, settings: LaunchSettings, hardware: Hardware) -> str:
    """Refuses a recipe that would not fit the GPUs at the fewest nodes. Returns what was foretold.

    Raises:
        UserError: it does not fit, or its models do not allow a plan.
    """
    recipe, corpus = corpus_of(recipe)
    nodes = settings.node_counts[0]
    planner = Planner(recipe, None, hardware, nodes, settings.ranks)
    plan = plan_as_is(planner, corpus, load_of(recipe, corpus, planner.world))
    needed = plan.predicted.device_bytes
    told = (
        f"{needed / GIB:.1f} of {hardware.memory / GIB:.1f} GiB per GPU, {plan.predicted.seconds['step']:.2g} s a step"
    )
    if needed > hardware.memory:
        raise UserError(
            "memory",
            f"needs {needed / GIB:.1f} GiB per GPU on {nodes} × {settings.ranks} {hardware.name}, which have "
            f"{hardware.memory / GIB:.1f}",
            "Run dist-train plan with the same recipe for settings that fit.",
        )
    return told


def hardware_named(name: str | None, gpu_types: Sequence[str]) -> Hardware | None:
    """The profile that is asked for, or the one of the partition's GPUs; None if nothing is known of them."""
    if name is not None:
        return load_hardware(name)
    for kind in gpu_types:
        for known in ("h100", "h200", "a100"):
            if known in kind.lower():
                return load_hardware(known)
    return None
