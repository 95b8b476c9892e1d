"""Whether every trainable learns: a census of the gradients of a run's first steps.

A trainable that never gets a gradient is no error to torch or DeepSpeed: it keeps its start value, and the run goes on.
The best known case: transformers' WavLM reads the weights of its attention projections without running those layers, so
an adapter wrapped around them is never called.

    census = Census(engine.module, steps=5)
    for step in ...:
        engine.backward(loss)
        census.after_backward(step)   # ends the run with what cannot learn, and why
        engine.step()
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharding.collectives import device
from sharding.errors import UserError, UserErrors

RAN, CAME, FINITE, NONZERO = range(4)
CONTAINERS = (nn.ParameterDict, nn.ParameterList, nn.ModuleDict, nn.ModuleList)
SHOWN = 8  # groups of names in a message


class Census:
    """Watches the gradient of every trainable until each had one, on some rank, that is not zero.

    A gradient that does not come, or is not finite, ends the run after the first backward. One that is zero is looked
    at again: it may be right at first, as that of LoRA's A, which B = 0 multiplies, or that of a part whose input no
    clip of the first batch has. Once nothing is left to watch, the census costs nothing.

    Args:
        module: what the engine runs.
        steps: optimizer steps after which a gradient that was always zero ends the run; at least 2, so that weights
            that start at zero have moved.
        excused: beginnings of names whose gradient may stay zero, and why.
    """

    def __init__(self, module: nn.Module, *, steps: int, excused: Mapping[str, str] = MappingProxyType({})) -> None:
        trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.names = [name for name, _ in trained]
        self.steps, self.excused = max(steps, 2), excused
        self.seen = torch.zeros(4, len(trained), dtype=torch.bool, device=device())
        self.seen[FINITE] = True
        self.hooks: list[Any] = []
        for index, (name, parameter) in enumerate(trained):
            self.hooks.append(parameter.register_hook(partial(self.came, index)))
            self.hooks.append(owner(module, name).register_forward_pre_hook(partial(self.ran, index)))

    def came(self, index: int, gradient: Tensor) -> None:
        """Notes a gradient, without waiting for the device."""
        self.seen[CAME, index] = True
        self.seen[FINITE, index].logical_and_(gradient.isfinite().all())
        self.seen[NONZERO, index].logical_or_(gradient.any())

    def ran(self, index: int, *_: Any) -> None:
        """Notes that the module which holds the trainable was called."""
        self.seen[RAN, index] = True

    def after_backward(self, step: int) -> None:
        """Takes the census after a backward of optimizer step `step` (counted from 0); collective until it is done.

        Raises:
            UserErrors: the same on every rank: trainables that cannot learn, by cause.
        """
        if not self.hooks:
            return
        seen = self.agreed()
        here = self.judge(seen, final=step + 1 >= self.steps)
        if here:
            self.close()
            raise UserErrors([UserError(f"step {step + 1}", *found) for found in here])
        self.seen[CAME] = False  # each backward must reach every trainable
        if all(seen[NONZERO]) or step + 1 >= self.steps:
            self.close()

    def agreed(self) -> list[list[bool]]:
        """[4][trainable]: ran, came and not zero on some rank; finite on all (collective)."""
        worst = self.seen.to(torch.int32)
        worst[FINITE] = 1 - worst[FINITE]
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        worst[FINITE] = 1 - worst[FINITE]
        return worst.bool().tolist()

    def judge(self, seen: list[list[bool]], *, final: bool) -> list[tuple[str, str]]:
        """What cannot learn: a problem and a remedy for each cause that is found."""
        uncalled: list[str] = []
        unreached: list[str] = []
        wild: list[str] = []
        zero: list[str] = []
        for name, ran, came, finite, nonzero in zip(self.names, *seen, strict=True):
            if not came:
                (unreached if ran else uncalled).append(name)
            elif not finite:
                wild.append(name)
            elif not nonzero and final and not name.startswith(tuple(self.excused)):
                zero.append(name)
        found = [
            (
                uncalled,
                "got no gradient, and the layers that hold them are never called: the model leaves them out, or reads "
                "their weights without running them, so that an adapter around them has no effect",
                "Give the adapter other target_modules, or freeze them",
            ),
            (
                unreached,
                "got no gradient although their layers run: no loss depends on the result",
                "Freeze them, or give the loss they serve a weight above 0",
            ),
            (wild, "got a gradient that is not finite", "Lower optimizer.learning_rate or set optimizer.clip_norm"),
            (
                zero,
                f"got only zeros as gradient in the first {self.steps} steps: a loss of weight 0, an input that "
                "no clip has, or a result that is multiplied by 0",
                "Freeze them, or give the loss they serve a weight above 0",
            ),
        ]
        return [
            (f"{len(names)} of {len(self.names)} trainables {problem}; they are {grouped(names)}", remedy)
            for names, problem, remedy in found
            if names
        ]

    def close(self) -> None:
        """Stops watching."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


def owner(module: nn.Module, name: str) -> nn.Module:
    """The innermost module that holds the parameter and is itself called."""
    path = name.rpartition(".")[0]
    while isinstance(held := module.get_submodule(path), CONTAINERS) and path:
        path = path.rpartition(".")[0]
    return held


def grouped(names: Iterable[str]) -> str:
    """Names that differ only in numbers as one: `layers.*.q_proj.weight (24)`."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    shown = [f"{kind} ({len(own)})" if len(own) > 1 else own[0] for kind, own in list(kinds.items())[:SHOWN]]
    more = [f"and {len(kinds) - SHOWN} more kinds"] if len(kinds) > SHOWN else []
    return ", ".join([*shown, *more])
