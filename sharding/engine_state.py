"""What a DeepSpeed engine holds of a parameter, whole and by name, at any ZeRO stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharding import eight_bit
from sharding.collectives import device

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's running mean and mean square of the gradient


@dataclass(frozen=True)
class Share:
    """The elements of a parameter that this rank updates: held.flatten()[start : start + count], which are those from
    `offset` on of the flattened parameter. `held` is the fp32 tensor Adam steps on.
    """

    held: Tensor
    start: int
    count: int
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The share's part of a tensor shaped like `held`, as a view."""
        return tensor.view(-1)[self.start : self.start + self.count]


def adam(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's wrappers."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def share(engine: Any, parameter: Any) -> Share | None:
    """What this rank updates of a trainable; None for nothing."""
    if hasattr(parameter, "ds_id"):
        sharder = parameter._z3_optimizer
        group, start, size = sharder.grad_position[sharder.get_param_id(parameter)]
        offset = size * dist.get_rank()
        count = max(min(size, parameter.ds_numel - offset), 0)
        return Share(sharder.fp32_partitioned_groups_flat[group], start, count, offset)
    if not sharded(parameter):
        return Share(stepped(engine, parameter), 0, parameter.numel(), 0)
    if parameter._hp_mapping is None:
        return None
    here, whole = parameter._hp_mapping.hp_fragment_address, parameter._hp_mapping.lp_fragment_address
    partition = engine.optimizer.single_partition_of_fp32_groups[parameter._hp_mapping.param_group_index]
    return Share(partition, here.start, here.numel, whole.start)


def whole(engine: Any, parameter: Any, value: Any, to: int | None = None) -> Tensor:
    """Puts value(share) of all ranks together, in the parameter's shape, on every rank or on rank `to`; the others
    then get some tensor of that shape. Collective, but for a `to` whose share is all of it: it asks nobody.
    """
    shape = getattr(parameter, "ds_shape", parameter.shape)
    own = share(engine, parameter)
    if to == dist.get_rank() and own is not None and own.count == shape.numel():
        return value(own).detach().view(shape)
    flat = torch.zeros(shape.numel(), device=device())
    if own is not None:
        flat[own.offset : own.offset + own.count] = value(own).detach()
    if sharded(parameter) and to is None:
        dist.all_reduce(flat)
    elif sharded(parameter):
        dist.reduce(flat, dst=to)
    return flat.view(shape)


def own_part(engine: Any, parameter: nn.Parameter, value: Tensor) -> tuple[Share, Tensor] | None:
    """This rank's share, and its elements of a whole value."""
    own = share(engine, parameter)
    return None if own is None else (own, value.flatten()[own.offset : own.offset + own.count])


def master(engine: Any, parameter: nn.Parameter, to: int | None = None) -> Tensor:
    """The whole fp32 master of a trainable, on every rank or on rank `to` (collective)."""
    return whole(engine, parameter, lambda own: own.of(own.held), to)


def set_master(engine: Any, parameter: nn.Parameter, value: Tensor) -> None:
    """Writes the whole fp32 master `value` into this rank's share."""
    found = own_part(engine, parameter, value)
    if found is not None:
        own, part = found
        own.of(own.held.data).copy_(part)


def moment(engine: Any, parameter: nn.Parameter, name: str, to: int | None = None) -> Tensor:
    """The whole optimizer moment of a trainable in fp32, on every rank or on rank `to` (collective)."""
    states = adam(engine).state

    def value(own: Share) -> Tensor:
        state = states[own.held]
        return own.of(state[name]) if name in state else eight_bit.read(state, name, own.start, own.count)

    return whole(engine, parameter, value, to)


def set_moment(engine: Any, parameter: nn.Parameter, name: str, value: Tensor) -> None:
    """Writes a whole optimizer moment into this rank's share. `set_adam_step` makes it hold."""
    found = own_part(engine, parameter, value)
    if found is not None:
        own, part = found
        state = adam(engine).state[own.held]
        own.of(state[name] if name in state else eight_bit.unpacked(state, name)).copy_(part)


def create_moments(engine: Any) -> None:
    """Creates Adam's state before the first step, so that a checkpoint can be written into it."""
    optimizer: Any = adam(engine)
    # Stage 3 hands Adam its flat partitions only while it steps.
    partitions = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    for tensor in partitions or [tensor for group in optimizer.param_groups for tensor in group["params"]]:
        state = optimizer.state[tensor]
        if state:
            continue
        if hasattr(optimizer, "init_state"):
            eight_bit.create(optimizer, tensor)
        else:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update({name: torch.zeros_like(tensor) for name in MOMENTS})


def reset_moments(engine: Any) -> None:
    """Back to step 0: DeepSpeed's bf16 stage 0 takes an empty step at start, which would make the first update 0.74
    times as long.
    """
    adam(engine).state.clear()


def adam_step(engine: Any) -> int:
    """Number of updates Adam has made."""
    steps = {int(state["step"]) for state in adam(engine).state.values() if "step" in state}
    return max(steps, default=0)


def set_adam_step(engine: Any, step: int) -> None:
    """Sets Adam's update count (bias correction depends on it), after all moments have been written."""
    for state in adam(engine).state.values():
        eight_bit.pack(state)
        state["step"] = step if isinstance(state["step"], int) else torch.full_like(state["step"], step)


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
