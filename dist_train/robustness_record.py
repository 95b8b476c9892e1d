"""robustness_SPLIT.json: what it holds, written by `dist-train evaluate --robustness` and read by the report."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, model_validator

from dist_train.names import Modality
from dist_train.task import MEASURES, Kind

Metrics = dict[str, FiniteFloat | None]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9 .+]{1,60}$")]  # goes into figures


class Scores(BaseModel):
    """Metrics of one flow by name (`metrics.task_metrics`)."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: Metrics = Field(init=False)

    def value(self, name: str) -> float:
        """One metric; NaN where there is none."""
        found = (self.__pydantic_extra__ or {}).get(name)
        return math.nan if found is None else found


class RatePoint(Scores):
    """Where a share of the clips lacks a modality: mean over draws; NAME_std is the standard deviation."""

    rate: FiniteFloat


class NoisePoint(BaseModel):
    """Both flows under noise of one size."""

    size: FiniteFloat
    complete: Scores
    missing: Scores


class Robustness(BaseModel):
    """Everything; see `robustness.py` for what the conditions are."""

    kind: Kind = "regression"  # of task; older files do not say
    split: str
    clips: int
    draws: int
    floor: Metrics
    patterns: dict[Name, Scores]
    missing_rate: dict[Modality | Literal["random"], Annotated[list[RatePoint], Field(min_length=1)]]
    noise: dict[Modality, dict[Literal["ratio", "weight"], list[NoisePoint]]]
    values: dict[Name, list[list[FiniteFloat]]] = Field(
        description="Of a model with VGMR, by condition: [3][k + 1], means over clips of g, of p (as far as it has "
        "them) and of the gate."
    )

    @model_validator(mode="after")
    def shapes(self) -> Robustness:
        """All values have one shape, every modality both kinds of noise, and the patterns begin with everything."""
        shapes = {tuple(map(len, condition)) for condition in self.values.values()}
        if len(shapes) > 1 or not shapes <= {(width,) * 3 for width in (1, 2, 3)}:
            raise ValueError("values differ in shape")
        if any(set(kinds) != {"ratio", "weight"} for kinds in self.noise.values()) or not self.noise:
            raise ValueError("a kind of noise is missing")
        if "audio+text+vision" not in self.patterns or "audio+vision" not in self.patterns:
            raise ValueError("a pattern is missing")
        main = MEASURES[self.kind].main
        if self.floor.get(main) is None:
            raise ValueError("the floor is missing")
        points = [point for curve in self.missing_rate.values() for point in curve]
        sides = [
            side
            for kinds in self.noise.values()
            for row in kinds.values()
            for point in row
            for side in (point.complete, point.missing)
        ]
        if any(math.isnan(scores.value(main)) for scores in (*self.patterns.values(), *points, *sides)):
            raise ValueError(f"{main} is missing")
        if any(math.isnan(point.value(f"{main}_std")) for point in points):
            raise ValueError(f"{main}_std is missing")
        return self
