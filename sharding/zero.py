"""One DeepSpeed engine and its ZeRO settings."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn


class ZeroSettings(BaseModel):
    """ZeRO (arXiv 1910.02054): which state is sharded over ranks."""

    model_config = ConfigDict(extra="forbid")

    stage: Literal[0, 1, 2, 3] = Field(
        2, description="0: nothing, 1: optimizer state, 2: and gradients, 3: and parameters are sharded over ranks."
    )
    bucket_elements: int = Field(
        50_000_000, ge=1, description="Gradient elements reduced at once (memory against latency)."
    )
    persistence_threshold: int = Field(
        100_000, ge=0, description="Stage 3: parameters of fewer elements stay whole on every rank."
    )


def build_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: ZeroSettings,
    *,
    micro_batch: int,
    accumulation: int,
    clip_norm: float,
    bf16: bool,
) -> Any:
    """A DeepSpeed engine around `model`; the process group must exist.

    Args:
        micro_batch: rows per rank and micro-step (DeepSpeed only counts with it).
        clip_norm: global gradient norm, 0 for none.
    """
    import deepspeed  # noqa: PLC0415  takes 2 s; reading a recipe does not need it

    from sharding.engine_state import reset_moments  # noqa: PLC0415

    world = torch.distributed.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world,
        "gradient_clipping": clip_norm,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": settings.stage,
            "reduce_bucket_size": settings.bucket_elements,
            "stage3_param_persistence_threshold": settings.persistence_threshold,
            "contiguous_gradients": True,
        },
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    reset_moments(engine)
    return engine
