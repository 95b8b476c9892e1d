"""A run's model in DeepSpeed's engine, saved by DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_train.build import build_model, build_training
from dist_train.llm import load_tokenizer
from dist_train.recipe import load_recipe
from sharding.checkpoint import load, load_weights
from sharding.portable import Portable


def save(folder: Path, run: str) -> dict[str, Any]:
    """Writes <folder>/native from the run's best checkpoint."""
    recipe = load_recipe(Path(run) / "recipe.yaml")
    model = build_model(recipe, load_tokenizer(str(Path(run) / "tokenizer")), resumed=True)
    checkpoint = Portable(Path(run) / "checkpoints" / "best")
    load_weights(model, checkpoint)
    engine = build_training(recipe, model, micro_batch=1)
    load(engine, checkpoint)
    engine.save_checkpoint(str(folder / "native"), exclude_frozen_parameters=True)
    return {}
