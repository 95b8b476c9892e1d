"""The optimizer, and the learning rate as a pure function of progress."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from dist_train.quantise import bitsandbytes

DecayRate = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(BaseModel):
    """Adam as in the paper, AdamW, or AdamW with moments in 8 bits."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: Literal["adam", "adamw", "adamw_8bit"] = Field(
        "adam",
        description="`adam` couples weight decay with the gradient (L2, as in the paper); `adamw` decouples it; "
        "`adamw_8bit` also keeps the moments in 8 bits (bitsandbytes, arXiv 2110.02861): 2 instead of 8 bytes per "
        "trained parameter.",
    )
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(1e-5, ge=0, description="Weight decay.")
    betas: tuple[DecayRate, DecayRate] = Field((0.9, 0.999), description="Decay rates of the two moments.")
    epsilon: float = Field(1e-8, gt=0, description="Added to the denominator.")
    clip_norm: float = Field(0.0, ge=0, description="Largest global gradient norm; 0 = no clipping (as in the paper).")


class ScheduleSettings(BaseModel):
    """Learning rate over the run."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["paper", "constant", "linear", "cosine"] = Field(
        "paper",
        description="`paper`: per epoch 0.2, 0.4 … 1, then 0.9^⌊(e-4)/10⌋. "
        "Others: after warm-up constant, or to zero linearly or by cosine.",
    )
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps from zero to the peak (not used by `paper`).")

    def factor(self, step: int, epoch: int, total_steps: int) -> float:
        """Multiplier of the peak learning rate at optimizer step `step` (from 0) of `total_steps`, in epoch `epoch`
        (from 0).
        """
        if self.name == "paper":
            return 0.2 * (epoch + 1) if epoch < 5 else 0.9 ** ((epoch - 4) // 10)
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == "constant":
            return 1.0
        done = (step - self.warmup_steps) / max(total_steps - self.warmup_steps, 1)
        return 1.0 - done if self.name == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def build_optimizer(settings: OptimizerSettings, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """torch's own Adam or AdamW, or bitsandbytes' AdamW8bit: they run under all ZeRO stages, no op is compiled."""
    kinds: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    kind = bitsandbytes().optim.AdamW8bit if settings.name == "adamw_8bit" else kinds[settings.name]
    return kind(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
