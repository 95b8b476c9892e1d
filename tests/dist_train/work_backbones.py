"""What the ranks of test_backbones do: a few steps of the double flow with other encoders and language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_train.recipe import Recipe, validate
from tests import tiny
from tests.dist_train.backbones import ENCODERS, LANGUAGE_MODELS
from tests.dist_train.work_rules import train_on_one_batch


def recipe(text: str, audio: str, tuning: str, /, *, data: Path = Path("none"), **changes: Any) -> Recipe:
    """A tiny recipe with these parts."""
    values = tiny.recipe(data).model_dump()
    values["audio"] |= {"config": ENCODERS[audio], "tuning": tuning, "max_seconds": 30}
    values["text"] |= {"config": LANGUAGE_MODELS[text], "tuning": tuning}
    return validate(tiny.merge(values, changes))


def trained(folder: Path, seed: int, pairs: list[tuple[str, str, str]]) -> dict[str, Any]:
    """Losses in ZeRO-2 and -3 of each (language model, encoder, tuning), and what of the trainables has not moved."""
    found = {}
    for text, audio, tuning in pairs:
        losses, still = {}, {}
        for stage in (2, 3):
            made = recipe(
                text,
                audio,
                tuning,
                seed=seed,
                simulation={"rollout": "generate"},
                optimizer={"learning_rate": 1e-3},
                loss={"mkd1": 0.0, "mkd2": 0.0},  # their teacher is detached: the sum need not fall
                widths={"vision": tiny.VISION_WIDTH},
                zero={"stage": stage},
            )
            outcome = train_on_one_batch(made, seed)
            losses[stage], still[stage] = outcome["losses"], outcome["still"]
        found[f"{text}, {audio}, {tuning}"] = {"losses": losses, "still": still}
    return found
