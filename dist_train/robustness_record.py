"""robustness_SPLIT.json: what it holds, written by `dist-train evaluate --robustness` and read by the report."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, model_validator

from dist_train.names import Modality

Metrics = dict[str, FiniteFloat | None]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9 .+]{1,60}$")]  # goes into figures


class Scores(BaseModel):
    """Metrics of one flow (`metrics.valence_metrics`); further ones are kept as they are."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: Metrics = Field(init=False)

    mae: FiniteFloat


class RatePoint(Scores):
    """Where a share of the clips lacks a modality: mean over draws; NAME_std is the standard deviation."""

    rate: FiniteFloat
    mae_std: FiniteFloat


class NoisePoint(BaseModel):
    """Both flows under noise of one size."""

    size: FiniteFloat
    complete: Scores
    missing: Scores


class Robustness(BaseModel):
    """Everything; see `robustness.py` for what the conditions are."""

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
        if self.floor.get("mae") is None:
            raise ValueError("the floor is missing")
        return self
