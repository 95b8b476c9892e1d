"""What every format is read into and written from: tensors by name, read only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sharding.portable import Portable


@dataclass(frozen=True)
class Tensors:
    """Tensors by name.

    Args:
        shapes: of each, without reading it.
        dtypes: of each, likewise.
        read: one tensor, on the CPU.
    """

    shapes: dict[str, list[int]]
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], Tensor]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """All of them, one by one."""
        return ((name, self.read(name)) for name in self.shapes)


def nothing() -> Tensors:
    """No tensors."""

    def read(name: str) -> Tensor:
        raise KeyError(name)

    return Tensors({}, {}, read)


@dataclass(frozen=True)
class Held:
    """What a checkpoint holds.

    Args:
        weights: by parameter (or buffer) name.
        moments: "exp_avg.<name>" and "exp_avg_sq.<name>"; none where the format keeps no optimizer.
        state: as in a portable checkpoint's state.json, as far as the format tells.
    """

    weights: Tensors
    moments: Tensors = field(default_factory=nothing)
    state: dict[str, Any] = field(default_factory=dict)


def read_portable(checkpoint: Portable) -> Held:
    """A portable checkpoint of ours; all its tensors are fp32 but buffers, which may be of any kind."""

    def tensors(kind: Any) -> Tensors:
        names = checkpoint.names(kind)
        return Tensors(
            {name: checkpoint.shape(kind, name) for name in names},
            {name: checkpoint.dtype(kind, name) for name in names},
            lambda name: checkpoint.tensor(kind, name),
        )

    return Held(tensors("model"), tensors("optimizer"), checkpoint.state)
