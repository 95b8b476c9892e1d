"""Measures what a block of code holds and sends."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Which tensor argument of a collective is whole, and its name.
WHOLE = {
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}


class Meter(TorchDispatchMode):
    """Bytes of live tensors, most of them ever, and bytes given to collectives, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}
        self.wire: Counter[str] = Counter()
        for storage in live_storages():
            self.hold(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.count(func, args)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.hold(tensor.untyped_storage())
        return result

    def hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def freed(_: Any) -> None:
            del self.known[key]
            self.now -= size

        self.known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)

    def count(self, func: Any, args: Any) -> None:
        name = func.__name__.split(".")[0]
        if name in WHOLE:
            whole = args[1] if name == "_reduce_scatter_base_" else args[0]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves(whole))
            self.wire[WHOLE[name]] += size


def live_storages() -> list[torch.UntypedStorage]:
    """Every storage in this process, once per tensor."""
    gc.collect()
    # By type: to ask some objects for their class wakes them up (torch's deprecated names warn).
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided and not tensor.is_meta]
