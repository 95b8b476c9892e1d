"""What of the model gets no signal from this data and these losses, by the user's choice: the census lets it be."""

from __future__ import annotations

from dist_train.names import MODALITIES
from dist_train.notes import column
from dist_train.recipe import Recipe
from sharding.stream import ShardedSplit

READERS = {  # what only a clip with the modality gives a gradient to; audio is also what text is imagined from
    "audio": ("audio.", "projector.", "llm."),
    "text": ("llm.", "text_features."),
    "vision": (),
}


def idle_parts(recipe: Recipe, train: ShardedSplit) -> dict[str, str]:
    """Beginnings of the names of parameters whose gradient may stay zero, and why."""
    idle = {}
    if recipe.loss.rnc == 0:
        idle["fusion.rnc_head."] = "loss.rnc is 0"
    for place, modality in enumerate(MODALITIES):
        if all(length is None for length in column(recipe, train, modality)):
            parts = (f"fusion.{part}.{place}." for part in ("projections", "pooled_attention", "view_attention"))
            reason = f"no training clip has {modality}"
            idle |= dict.fromkeys((*READERS[modality], *parts), reason)
            if recipe.missing == "random":  # then none can lose it
                idle |= {f"fusion.{part}_imagination.{modality}.": reason for part in ("pooled", "views")}
    return idle
