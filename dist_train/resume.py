"""Continuing a run: from which checkpoint, and under which recipes."""

from __future__ import annotations

from rich.console import Console

from dist_train.build import open_split
from dist_train.keys import flat, is_free
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from dist_train.run_state import read_run_state
from sharding.errors import UserError, UserErrors
from sharding.retention import newest_whole, set_back

# Keys that decide how a run goes, not what it trains: the clips of each step and the losses stay the same, but for
# rounding.
FREE = (
    *("training.epochs", "training.patience", "training.validate_every", "training.profile_step"),
    *("training.check_agreement_steps", "training.watchdog_seconds"),
    *("data.workers", "data.evaluation_batch", "data.on_bad_sample"),
    *("audio.activation_checkpointing", "text.activation_checkpointing"),
    *("checkpoint.", "zero."),  # all that begin so
)
LAYOUT = ("training.accumulation", "data.budget.")  # likewise, where losses are those of the whole step
SAME_UPDATE = {"adamw", "adamw_8bit"}  # but for the rounding of the moments


def check_same(before: Recipe, now: Recipe) -> None:
    """Refuses to resume under a recipe that would train something else. That the dataset holds the same clips is
    checked by `continue_from`.

    Raises:
        UserErrors: each key that differs.
    """
    old, new = flat(before.model_dump(mode="json")), flat(now.model_dump(mode="json"))
    free = (*FREE, "data.path", "data.sources", *(LAYOUT if now.training.accumulated_loss == "exact" else ()))
    if {before.optimizer.name, now.optimizer.name} == SAME_UPDATE:
        free += ("optimizer.name",)
    errors = [
        UserError(
            key,
            f"is {new.get(key)!r}, the run was started with {old.get(key)!r}",
            "Resume with the run's own recipe.yaml.",
        )
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not is_free(key, free)
    ]
    if errors:
        raise UserErrors(errors)


def continue_from(run: RunDirectory, recipe: Recipe) -> None:
    """Makes the newest checkpoint that is whole the run's last one, and tells if it is not the newest of all. One
    process calls this.

    Raises:
        UserError: the dataset holds other clips.
        UserErrors: no checkpoint is whole.
    """
    newest = newest_whole(run.checkpoints)
    state = read_run_state(newest.checkpoint)
    now = open_split(recipe, "train").info.content_hash
    if now != state.content_hash:
        raise UserError(
            str(newest.checkpoint.directory),
            f"was trained on other clips ({state.content_hash[:12]}) than the dataset holds now ({now[:12]})",
            "Resume with the run's clips (in any tars), or start a new run.",
        )
    console = Console()
    for error in newest.errors:
        console.print(f"Note: {error.where} {error.problem}.", soft_wrap=True)
    set_back(run.checkpoints, newest)
    if newest.errors or newest.lost:
        console.print(f"Note: continued from {newest.checkpoint.directory}, the newest whole one.", soft_wrap=True)
    if "best" in newest.lost:
        console.print("Note: the best checkpoint so far is lost; the best is chosen among validations from here on.")
