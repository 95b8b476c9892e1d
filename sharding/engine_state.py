"""What a DeepSpeed engine holds of a parameter, whole and by name, at any ZeRO stage."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's running mean and mean square of the gradient


def adam(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's wrappers."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def reset_moments(engine: Any) -> None:
    """Back to step 0: DeepSpeed's bf16 stage 0 takes an empty step at start, which would make the first update 0.74
    times as long.
    """
    for state in adam(engine).state.values():
        for value in state.values():
            if torch.is_tensor(value):
                value.zero_()


def create_moments(engine: Any) -> None:
    """Creates Adam's state before the first step, so that a checkpoint can be written into it."""
    optimizer = adam(engine)
    # Stage 3 hands Adam its flat partitions only while it steps.
    partitions = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    for tensor in partitions or [tensor for group in optimizer.param_groups for tensor in group["params"]]:
        state = optimizer.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update({name: torch.zeros_like(tensor) for name in MOMENTS})
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


def adam_step(engine: Any) -> int:
    """Number of updates Adam has made."""
    steps = {int(state["step"]) for state in adam(engine).state.values() if "step" in state}
    return max(steps, default=0)


def set_adam_step(engine: Any, step: int) -> None:
    """Sets Adam's update count (bias correction depends on it)."""
    for state in adam(engine).state.values():
        state["step"] = torch.full_like(torch.as_tensor(state["step"]), step)


def master(engine: Any, parameter: nn.Parameter) -> Tensor:
    """The whole fp32 master of a trainable, on every rank (collective)."""
    return safe_get_full_fp32_param(parameter) if sharded(parameter) else stepped(engine, parameter).detach()


def set_master(engine: Any, parameter: nn.Parameter, value: Tensor) -> None:
    """Writes the whole fp32 master `value` into this rank's share."""
    if hasattr(parameter, "ds_id"):
        safe_set_local_fp32_param(parameter, own_partition(parameter, value))
    elif sharded(parameter):
        safe_set_full_fp32_param(parameter, value)
    else:
        stepped(engine, parameter).data.copy_(value)


def moment(engine: Any, parameter: nn.Parameter, name: str) -> Tensor:
    """The whole optimizer moment of a trainable, on every rank (collective)."""
    if sharded(parameter):
        return safe_get_full_optimizer_state(parameter, name)
    return adam(engine).state[stepped(engine, parameter)][name]


def set_moment(engine: Any, parameter: nn.Parameter, name: str, value: Tensor) -> None:
    """Writes a whole optimizer moment into this rank's share."""
    if hasattr(parameter, "ds_id"):
        safe_set_local_optimizer_state(parameter, own_partition(parameter, value), name)
    elif sharded(parameter):
        safe_set_full_optimizer_state(parameter, value, name)
    else:
        adam(engine).state[stepped(engine, parameter)][name].copy_(value)


def own_partition(parameter: Any, value: Tensor) -> Tensor:
    """Stage 3: this rank's flat slice of a whole value, padded.

    DeepSpeed's own setter of whole values fails on sizes that the ranks do not divide.
    """
    size = parameter.ds_tensor.ds_numel
    flat = value.flatten()
    padded = torch.nn.functional.pad(flat, (0, size * dist.get_world_size() - len(flat)))
    return padded.narrow(0, size * dist.get_rank(), size)


def stepped(engine: Any, parameter: nn.Parameter) -> Tensor:
    """Stage 0: the tensor Adam steps on, the parameter itself in fp32 or its fp32 copy in bf16."""
    copies = getattr(engine.optimizer, "fp32_groups", None)
    if copies is None:
        return parameter
    for group, copied in zip(engine.optimizer.fp16_groups, copies, strict=True):
        for low, high in zip(group, copied, strict=True):
            if low is parameter:
                return high
    raise KeyError("the parameter is not trained by this engine")


def sharded(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed keeps an fp32 master of its own for the parameter."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def own_gradient_norm(engine: Any) -> float | None:
    """Global gradient norm before engine.step() where DeepSpeed keeps no master (stage 0 in fp32) and so never tells
    it; else None.
    """
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    if not gradients or any(sharded(parameter) for parameter in engine.module.parameters() if parameter.requires_grad):
        return None
    return float(torch.nn.utils.get_total_norm(gradients))
