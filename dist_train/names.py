"""Names that files of a run and figures share with the model; nothing heavy is imported for them."""

from __future__ import annotations

from typing import Literal, get_args

Modality = Literal["audio", "text", "vision"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
"""In the order of the fusion network."""
FLOWS = ("complete", "missing")
