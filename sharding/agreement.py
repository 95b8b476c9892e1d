"""Whether all ranks run the same modules and give the same parameters a gradient, checked before ZeRO mixes them up.

ZeRO-1 and -2 put gradients into buckets in the order in which backward yields them and add the buckets of all ranks:
where ranks differ, the gradient of one parameter is added to that of another, without an error if the sizes fit.
ZeRO-3 keeps the gradient of a parameter that got none in this backward from the step before, and applies it again
(DeepSpeed's `partition_grads` overwrites its buffer, nothing clears it). Both checks end the run before the weights
change:

    with agreement.forward(step):
        outputs = engine(batch)
    with agreement.backward(step):
        engine.backward(loss)
    engine.step()

Under ZeRO-3 a forward that differs by rank fails or hangs in itself, because the ranks gather their parameters
together: no check behind it can help, only a model that runs the same modules for every batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharding.collectives import device, gather_objects
from sharding.errors import UserError


@dataclass(frozen=True)
class Agreement:
    """The checks of a run in its first steps; later ones cost nothing.

    Args:
        module: what the engine runs.
        until: first optimizer step (counted from 0) that is checked no more.
    """

    module: nn.Module
    until: int

    def forward(self, step: int) -> AbstractContextManager[None]:
        """Around the forward of a micro-step, see :func:`same_modules`."""
        return same_modules(self.module, f"step {step + 1}") if step < self.until else nullcontext()

    def backward(self, step: int) -> AbstractContextManager[None]:
        """Around the backward of a micro-step, see :func:`every_gradient`."""
        return every_gradient(self.module, f"step {step + 1}") if step < self.until else nullcontext()


@contextmanager
def same_modules(module: nn.Module, where: str) -> Iterator[None]:
    """Runs the block and compares over ranks which modules ran with gradient, in which order (collective).

    Only modules that hold parameters themselves count. What runs under `torch.no_grad` (decoding) may differ.

    Args:
        where: begins the message, e.g. "step 3".

    Raises:
        UserError: on every rank, naming the first module in which ranks differ and which ranks ran what.
    """
    ran: list[str] = []

    def note(name: str, *_: Any) -> None:
        if torch.is_grad_enabled():
            ran.append(name)

    with hooks(
        part.register_forward_pre_hook(partial(note, name))
        for name, part in module.named_modules()
        if next(part.parameters(recurse=False), None) is not None
    ):
        yield
    every = gather_if_different(ran)
    if every is not None:
        place, found = first_difference(every)
        raise UserError(
            where,
            f"the ranks run different modules: after {place} that are the same, {tell(found, 'run')}",
            "Every rank must run the same modules in the same order: where an input is missing, run them on a dummy "
            "and multiply the result by 0",
        )


@contextmanager
def every_gradient(module: nn.Module, where: str) -> Iterator[None]:
    """Runs the block, one backward, and checks that it gave every trainable its gradient, in the same order on every
    rank (collective).

    One backward, not one step: with gradient accumulation ZeRO-3 applies an old gradient also to a trainable that
    only the first backward leaves out.

    Args:
        where: begins the message, e.g. "step 3".

    Raises:
        UserError: on every rank, naming the first trainable without gradient, or out of order, and the ranks.
    """
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    came: list[str] = []

    def note(name: str, _: Tensor) -> None:
        came.append(name)

    with hooks(
        parameter.register_post_accumulate_grad_hook(partial(note, name))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ):
        yield
    different = gather_if_different(came)
    every = different or [came] * dist.get_world_size()
    without = [set(names).difference(own) for own in every]
    missing = [name for name in names if any(name in own for own in without)]
    if missing:
        ranks = [rank for rank, own in enumerate(without) if missing[0] in own]
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            where,
            f"{missing[0]}{more} got no gradient on {spell(ranks)}",
            "Use it in every micro-step, on a dummy times 0 where its input is missing, or freeze it: ZeRO-3 would "
            "apply its previous gradient again, ZeRO-1 and -2 would mix gradients if ranks differ",
        )
    if different:
        place, found = first_difference(different)
        raise UserError(
            where,
            f"the gradients arise in different orders: after {place} that are the same, {tell(found, 'have')}",
            "Every rank must use its parameters in the same order, or ZeRO-1 and -2 mix their gradients",
        )


@contextmanager
def hooks(handles: Iterator[Any]) -> Iterator[None]:
    """Keeps hooks for the length of the block."""
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()


def gather_if_different(names: Sequence[str]) -> list[list[str]] | None:
    """None if all ranks have the same names in the same order, else those of each rank (collective).

    Only 8 bytes are exchanged as long as they agree.
    """
    own = hashlib.sha256("\n".join(names).encode()).digest()[:8]
    digest = torch.tensor([int.from_bytes(own, signed=True)], device=device())
    every = [torch.empty_like(digest) for _ in range(dist.get_world_size())]
    dist.all_gather(every, digest)
    return None if len(set(torch.cat(every).tolist())) == 1 else gather_objects(list(names))


def first_difference(every: Sequence[Sequence[str]]) -> tuple[int, dict[str | None, list[int]]]:
    """The first place at which lists that differ do so, and which ranks have what there (None behind a list's end)."""
    place, there = next((place, there) for place, there in enumerate(zip_longest(*every)) if len(set(there)) > 1)
    found: dict[str | None, list[int]] = {}
    for rank, name in enumerate(there):
        found.setdefault(name, []).append(rank)
    return place, found


def tell(found: dict[str | None, list[int]], verb: str) -> str:
    """What which ranks have: `rank 0 runs b, ranks 1-3 run nothing more`."""
    one = {"run": "runs", "have": "has"}[verb]
    return ", ".join(
        f"{spell(ranks)} {one if len(ranks) == 1 else verb} {name or 'nothing more'}" for name, ranks in found.items()
    )


def spell(ranks: Sequence[int]) -> str:
    """Ascending ranks in words: `rank 2`, `ranks 0-3, 7`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    spans = ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {spans}"
