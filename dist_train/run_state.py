"""How far a run is, as its checkpoints keep it in state.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError

from sharding.errors import UserError, UserErrors
from sharding.portable import Portable

PARTS = {"audio": "audio.pretrained", "llm": "text.pretrained"}  # of the model: the key that names its weights


class Progress(BaseModel):
    """`step` counts optimizer steps made; `epoch` and `epoch_step` say which comes next, `samples` how many clips were
    trained on. The order of clips, dropout and the learning rate are functions of these and the recipe.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    step: NonNegativeInt = 0
    epoch: NonNegativeInt = 0
    epoch_step: NonNegativeInt = 0
    samples: NonNegativeInt = 0
    seconds: NonNegativeFloat = 0.0
    best_step: NonNegativeInt | None = None
    best_score: float | None = None
    validations_since_best: NonNegativeInt = 0
    set_aside: list[str] = Field(default_factory=list)

    def forget_best(self) -> None:
        """Chooses the best anew from here on: its checkpoint is lost."""
        self.best_step, self.best_score, self.validations_since_best = None, None, 0


class RunState(BaseModel):
    """What the trainer puts into state.json beside what `sharding.saver` adds."""

    run_id: str
    progress: Progress
    seed: NonNegativeInt
    world_size: PositiveInt
    zero_stage: Literal[0, 1, 2, 3]
    bases: dict[str, str]  # part of the model: fingerprint of its frozen weights
    content_hash: str  # of the dataset
    rollouts: dict[str, Any] | None = None


def read_run_state(checkpoint: Portable) -> RunState:
    """The run's state in a checkpoint.

    Raises:
        UserError: it is not one that a run has written.
    """
    try:
        return RunState.model_validate(checkpoint.state)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            str(checkpoint.directory / "state.json"),
            f"is not the state of a run ({'.'.join(map(str, first['loc']))}: {first['msg']})",
            "Use another checkpoint of the run.",
        ) from None


def check_bases(checkpoint: Path, before: dict[str, str], now: dict[str, str]) -> None:
    """Refuses a checkpoint whose trainables belong to other frozen weights.

    Args:
        before: `RunState.bases` of the checkpoint.
        now: `sharding.checkpoint.fingerprints` of the model it is to be loaded into.

    Raises:
        UserErrors: each part of the model whose frozen weights are others.
    """
    errors = [
        UserError(
            str(checkpoint),
            f"was trained on other frozen weights of {PARTS.get(part, part)} than those loaded now",
            "Point the run's recipe to the original model, or say --accept-other-base if you mean this one.",
        )
        for part in sorted(before.keys() | now.keys())
        if before.get(part) != now.get(part)
    ]
    if errors:
        raise UserErrors(errors)
