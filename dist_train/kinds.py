"""Sections of a recipe of which one word is the kind."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class OfKind(BaseModel):
    """Settings with a `kind`, which may stand for all of them: `refine: vgmr` is `refine: {kind: vgmr}`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def of_one_word(cls, value: Any) -> Any:
        """One word as a mapping."""
        return {"kind": value} if isinstance(value, str) else value
