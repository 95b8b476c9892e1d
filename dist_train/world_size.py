"""Whether recipe and data can feed so many ranks: foreseen before they start, checked again by rank 0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dist_train.recipe_file import read_values
from sharding.errors import UserError
from sharding.shards import load_info


def foresee(recipe: Path, overrides: Sequence[str], ranks: int) -> None:
    """Refuses too many ranks from the text of the recipe and dataset.json alone: each rank would first import for
    seconds. Whatever else is wrong with recipe or data, rank 0 tells in full.

    Raises:
        UserError: the recipe cannot be read as YAML; see also `check_world_size`.
    """
    values, _ = read_values(recipe, overrides)
    try:
        data, training = values["data"], values.get("training") or {}
        roots = [source["path"] for source in data.get("sources") or ()] or [data["path"]]
        splits = [load_info(Path(root)).splits for root in roots]
        clips = sum(found["train"].samples for found in splits if "train" in found)
        batch, accumulation = data.get("batch"), training.get("accumulation", 1)
    except (UserError, LookupError, TypeError, AttributeError):
        return
    known = type(batch) is int and type(accumulation) is int
    check_world_size(
        data.get("path"), clips, ranks, batch=batch if known else None, accumulation=accumulation if known else 1
    )


def check_world_size(
    path: str | None, clips: int, ranks: int, *, batch: int | None = None, accumulation: int = 1
) -> None:
    """Refuses data that cannot feed every rank.

    Args:
        path: of the dataset; None: `data.sources`.
        clips: in its training split.
        batch: clips per optimizer step over all ranks; None if not known.
        accumulation: micro-steps per optimizer step.

    Raises:
        UserError: fewer clips, or a smaller batch, than there are places to fill.
    """
    if clips < ranks:
        raise UserError(
            path or "data.sources", f"has {clips} training clips for {ranks} ranks", f"Use at most {clips} ranks."
        )
    if batch is not None and batch < ranks * accumulation:
        raise UserError(
            "data.batch",
            f"{batch} clips cannot feed {ranks} ranks × {accumulation} micro-steps",
            f"Write at least {ranks * accumulation}.",
        )
