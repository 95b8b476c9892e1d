"""One DeepSpeed engine and its ZeRO settings."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from sharding.collectives import device

QUANTISED = ("Linear4bit", "Linear8bitLt")  # layers of bitsandbytes

REUSE = 8  # of the parameters, the share within which one that comes again is kept whole


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
    offload_optimizer: Literal["none", "cpu"] = Field(
        "none", description="Stages 1 to 3: where fp32 masters and moments lie and are updated, if not on the GPU."
    )
    offload_parameters: Literal["none", "cpu"] = Field(
        "none", description="Stage 3: where each rank's shard of the parameters lies while it is not used."
    )
    replicate_int8: bool = Field(
        False,
        description="Allow text.quantisation or audio.quantisation: int8 under stage 3, where every rank keeps a whole "
        "copy of the int8 weights besides its shard.",
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
    """A DeepSpeed engine around `model`, which goes to this rank's device; the process group must exist.

    Args:
        model: on the CPU, its frozen weights the same on all ranks. Under stage 3 its parameters are cut over the ranks
            one by one: no device ever holds all of them, quantised ones excepted.
        micro_batch: rows per rank and micro-step (DeepSpeed only counts with it).
        clip_norm: global gradient norm, 0 for none.
    """
    import deepspeed  # noqa: PLC0415  takes 2 s; reading a recipe does not need it

    from sharding.engine_state import adam, reset_moments  # noqa: PLC0415

    world = torch.distributed.get_world_size()
    elements = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    zero: dict[str, Any] = {
        "stage": settings.stage,
        "reduce_bucket_size": settings.bucket_elements,
        "stage3_param_persistence_threshold": settings.persistence_threshold,
        # Whether a parameter comes again so soon that it stays is asked of every module that is left of a step, unless
        # so many elements end the search: below DeepSpeed's 1e9 a small model's second step took a minute.
        "stage3_max_reuse_distance": min(10**9, elements // REUSE),
        "contiguous_gradients": True,
    }
    if settings.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": settings.offload_optimizer, "pin_memory": torch.cuda.is_available()}
    if settings.offload_parameters != "none":
        zero["offload_param"] = {"device": settings.offload_parameters, "pin_memory": torch.cuda.is_available()}
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world,
        "gradient_clipping": clip_norm,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's updates on a CPU too, without a compiled op
        "zero_optimization": zero,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if settings.stage == 3:
        for module in model.modules():
            if type(module).__name__ in QUANTISED:  # their scales are neither parameters nor buffers
                module.to(device())
            module._buffers.update({name: to_device(buffer) for name, buffer in module._buffers.items()})
        deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=torch.bfloat16 if bf16 else torch.float32)
    else:
        model.to(device())
    # All that build_optimizer makes are tested here.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in str(record.msg))
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # DeepSpeed may take an empty step, whose weight decay must not act
    with not_broadcast(parameter for parameter in model.parameters() if not parameter.requires_grad):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for group, rate in zip(adam(engine).param_groups, rates, strict=True):
        group["lr"] = rate
    reset_moments(engine)
    return engine


@contextmanager
def not_broadcast(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While active, DeepSpeed does not send these from rank 0 to all (stages 0 to 2; in stage 3 zero.Init sends each
    parameter as it cuts it): every rank has read them from the same files.

    Pages of a file that a rank only reads stay shared by all ranks of a node; writing the same values would copy them.
    """
    marked: list[Any] = list(parameters)
    for parameter in marked:
        parameter.ds_optim_param = True  # "unique per rank" to DeepSpeed (runtime/engine.py, _broadcast_model)
    try:
        yield
    finally:
        for parameter in marked:
            del parameter.ds_optim_param


def to_device(buffer: Tensor | None) -> Tensor | None:
    """A module's buffer on this rank's device."""
    return None if buffer is None else buffer.to(device())
