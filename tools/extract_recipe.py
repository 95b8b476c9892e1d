"""Which recipes features can be extracted for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dist_train.build import fit_to_dataset
from dist_train.recipe import Recipe, load_recipe
from sharding.errors import UserError, UserErrors

CHECKPOINT = "give the run that has trained it: --checkpoint DIR"


def extractable(path: Path, overrides: Sequence[str], checkpoint: Path | None) -> Recipe:
    """The recipe, resolved.

    Raises:
        UserError, UserErrors: it is wrong, or its features would be stale as soon as they are there.
    """
    recipe = load_recipe(path, overrides)
    errors = list(problems(recipe, trained=checkpoint is not None))
    if errors:
        raise UserErrors(errors)
    return fit_to_dataset(recipe)


def problems(recipe: Recipe, *, trained: bool) -> Iterable[UserError]:
    """What is in the way.

    Args:
        trained: a checkpoint holds what the recipe trains.
    """
    if recipe.data.sources is not None:
        yield UserError("data.sources", "are several datasets", "Extract each of them by itself: data.path.")
    if not recipe.reads_language_model and recipe.audio.input == "features":
        yield UserError(
            "audio.input",
            "and text.input are features: there is nothing to extract",
            "Name the recipe with the models.",
        )
    if recipe.reads_language_model and recipe.text.input == "features":
        yield UserError(
            "text.input",
            "is features, which enter the language model's width through a trained layer",
            "Write text.input: transcript, or leave the language model out.",
        )
    if recipe.imagination.cmpt and recipe.audio.input == "waveform":
        yield UserError(
            "imagination",
            "is cmpt, whose tokens are trained inside the speech encoder: its states are no features",
            "Write imagination: mia, and name cmpt in the recipe that trains on the features.",
        )
    if recipe.imagination.promma:
        yield UserError(
            "imagination",
            "is promma, whose evaluator would keep clips from being imagined at all",
            "Write imagination: mia, and name promma in the recipe that trains on the features.",
        )
    if trained:
        return
    parts = {"audio": recipe.audio.input == "waveform", "text": recipe.reads_language_model}
    for name, read in parts.items():
        tuning = getattr(recipe, name).tuning
        if read and tuning != "frozen":
            yield UserError(
                f"{name}.tuning",
                f"is {tuning}: training changes what the features come from",
                f"Write {name}.tuning: frozen, or {CHECKPOINT}.",
            )
    if recipe.simulation.imagines and recipe.simulation.projector is None:
        yield UserError(
            "simulation.projector",
            "is missing: from a random projector a language model hears nothing",
            f"Name a pre-trained one, or {CHECKPOINT}.",
        )
