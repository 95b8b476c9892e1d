"""What a run cannot have learnt, and what its scores do not show: said plainly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_train.build import open_split
from dist_train.names import FLOWS
from dist_train.recipe import Recipe
from dist_train.task import MEASURES
from sharding.shuffle import shares
from sharding.stream import ShardedSplit

SHOWN = 5  # set-aside clips named


def shortcomings(
    recipe: Recipe, train: ShardedSplit, set_aside: list[str], scores: dict[str, dict[str, Any]]
) -> list[str]:
    """Notes for summary.json, the terminal and the report.

    Args:
        train: the training split.
        set_aside: "key: reason" of training clips that were left out.
        scores: evaluations by split.
    """
    notes = []
    for name, lost in (
        ("text", "the complete flow has learnt nothing from text and nothing was distilled from it"),
        ("audio", "no text could be imagined from it"),
        ("vision", "faces play no part"),
    ):
        values = column(recipe, train, name)
        count = sum(value is not None for value in values)
        if count == 0:
            notes.append(f"No training clip has {name}: {lost}.")
            others = [
                split for split in scores if any(v is not None for v in column(recipe, open_split(recipe, split), name))
            ]
            if others:
                notes.append(
                    f"Clips of {' and '.join(others)} do have {name}: it enters layers that were never trained on any, "
                    "so a flow that sees it may be worse than one that does not."
                )
        elif count < len(values) / 2:
            notes.append(f"Only {count} of {len(values)} training clips have {name}.")
    split = "test" if "test" in scores else "valid"
    if split == "valid":
        notes.append("There is no test split: the scores are those of the split that selected the checkpoint.")
    if not recipe.compares_flows:
        notes.append("No loss trained the flows' predictions: of the scores only transcription (nats/token) counts.")
    measure = MEASURES[recipe.task.kind]
    complete, missing, floor = (measure.loss(scores[split][part][measure.main]) for part in (*FLOWS, "floor"))
    if min(complete, missing) >= floor and recipe.compares_flows:
        notes.append(f"Neither flow beats the trivial answer, {measure.answer}, on {split} ({measure.title}).")
    if recipe.task.classifies:
        absent = set(range(len(recipe.task.classes))) - set(train.labels.astype(int).tolist())
        if absent:
            names = ", ".join(recipe.task.classes[place] for place in sorted(absent))
            notes.append(f"No training clip is of the class {names}: it cannot be learnt.")
    if len(train.sources) > 1:
        counts = zip(train.sources, shares(train.sources), strict=True)
        parts = [f"{n} of {one.name} ({n / one.samples:.2g} passes over its {one.samples})" for one, n in counts]
        notes.append(f"An epoch of {len(train)} clips mixes {', '.join(parts)}.")
    if recipe.data.order_window is not None and not train.columns.in_order:
        notes.append(
            "The tars are not in key order, so data.shuffle: windowed read at random: make the shards anew, or shuffle "
            "globally."
        )
    if set_aside:
        more = f" and {len(set_aside) - SHOWN} more" if len(set_aside) > SHOWN else ""
        notes.append(f"Training clips set aside: {'; '.join(one.rstrip('.') for one in set_aside[:SHOWN])}{more}.")
    return notes


def column(recipe: Recipe, split: ShardedSplit, name: str) -> Sequence[float | int | None]:
    """Lengths of one modality as the recipe reads it, None where a clip lacks it."""
    columns = split.columns
    if name == "text":
        return columns.text_frames if recipe.text.input == "features" else columns.text_characters
    if name == "audio":
        return columns.audio_seconds if recipe.audio.input == "waveform" else columns.audio_frames
    return columns.vision_frames
