"""What each clip takes of a micro-batch's budget (BudgetSettings), from the lengths in the index."""

from __future__ import annotations

import numpy as np

from dist_train.recipe import Recipe
from sharding.budget import Cost, oversized
from sharding.errors import UserError
from sharding.shards import Columns
from sharding.stream import ShardedSplit
from sharding.table import Table, filled

CHARACTERS_PER_TOKEN = 3  # fewer than English has (about 4.5): an estimate on the safe side
FRAMES_PER_SECOND = 50  # WavLM


def clip_costs(recipe: Recipe, split: ShardedSplit) -> tuple[Cost, ...]:
    """The limits of `data.budget` with what each clip of the split takes; empty without a budget.

    Raises:
        UserError: a clip exceeds a limit by itself.
    """
    budget = {name: limit for name, limit in recipe.data.budget.model_dump().items() if limit is not None}
    if not budget:
        return ()
    seconds = audio_seconds(recipe, split.columns)
    values = {
        "audio_seconds": (seconds, True),
        "squared_seconds": (seconds**2, True),
        "tokens": (tokens(recipe, split.columns, seconds), False),
    }
    costs = tuple(Cost(name, values[name][0], limit, padded=values[name][1]) for name, limit in budget.items())
    for cost, index in oversized(costs):
        need = cost.values[index]
        raise UserError(
            f"sample {split.keys[index]}",
            f"takes {need:.0f} of data.budget.{cost.name}, the limit is {cost.limit:g}",
            f"Raise data.budget.{cost.name} to {np.ceil(need):.0f}, or lower audio.max_seconds or text.max_tokens with "
            "data.on_bad_sample: set_aside.",
        )
    return costs


def audio_seconds(recipe: Recipe, columns: Columns | Table) -> np.ndarray:
    """[n] seconds WavLM hears; what is absent or will be set aside counts as a frame."""
    heard = filled(columns.audio_seconds)
    if recipe.audio.input == "features":
        heard = filled(columns.audio_frames) / FRAMES_PER_SECOND
    elif recipe.data.on_bad_sample == "set_aside":
        heard[heard > recipe.audio.max_seconds] = 0.0
    return np.maximum(heard, 1 / FRAMES_PER_SECOND)


def tokens(recipe: Recipe, columns: Columns | Table, seconds: np.ndarray) -> np.ndarray:
    """[n] positions in the language model over both flows (estimated from characters)."""
    simulation = recipe.simulation
    said = filled(columns.text_characters) / CHARACTERS_PER_TOKEN
    said = np.minimum(said, recipe.text.max_tokens)
    real = 1 + said if recipe.text.input == "transcript" else np.zeros_like(said)
    if not simulation.imagines:
        return real
    asked = seconds * FRAMES_PER_SECOND / simulation.stack_frames
    if simulation.rollout != "prefix":
        answer = np.where(said > 0, said, seconds * FRAMES_PER_SECOND / simulation.stack_frames)
        asked += len(simulation.prompt) / CHARACTERS_PER_TOKEN + np.minimum(answer, simulation.max_new_tokens)
    if recipe.loss.asr > 0:
        spoken = seconds * FRAMES_PER_SECOND / simulation.stack_frames + said
        asked += np.where(said > 0, spoken + len(simulation.prompt) / CHARACTERS_PER_TOKEN, 0)
    return real + asked
