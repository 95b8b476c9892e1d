"""Runs operations on tensors without data: what comes out has a shape and a type, and nothing is computed.

Torch finds the shape of a result in Python for many operations, in a tenth of a millisecond or more each. A model runs
the same ones again and again, layer by layer; so the layout of a result is kept with those of its arguments.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sharding.plan_kernels import SUBSTITUTES


class Layout(NamedTuple):
    """What a tensor without data is."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Operations:
    """Runs operations, and knows the layouts of the results it has seen."""

    def __init__(self) -> None:
        self.known: dict[Hashable, list[Layout]] = {}

    def run(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """The result: real if it and all it comes from are whole numbers, else without data.

        Args:
            tensors: all among the arguments.
        """
        if not tensors:
            result = on("meta", func, args, kwargs)
            floats = any(output.is_floating_point() for output in tensors_in([result]))
            return result if floats else on("cpu", func, args, kwargs)
        if str(func) in SUBSTITUTES:
            return SUBSTITUTES[str(func)](func, *args, **kwargs)
        meta = [tensor.is_meta for tensor in tensors]
        if not any(meta):
            result = on("cpu", func, args, kwargs)
            floats = any(output.is_floating_point() for output in tensors_in([result]))
            return tree_map_only(Tensor, without_data, result) if floats else result
        if not all(meta):
            args, kwargs = tree_map_only(Tensor, without_data, (args, kwargs))
        return self.on_meta(func, args, kwargs, tensors) if makes_its_own(func) else on("meta", func, args, kwargs)

    def on_meta(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """An operation whose results are no views of its arguments, all of which are without data."""
        key = func, signature(args), signature(kwargs)
        layouts = self.known.get(key)
        if layouts is None:
            result = on("meta", func, args, kwargs)
            outputs = result if isinstance(result, tuple) else (result,)
            inputs = {tensor.untyped_storage()._cdata for tensor in tensors}
            # Some give a view though their schema does not say so (_unsafe_view), or no tensor.
            if all(type(output) is Tensor and output.untyped_storage()._cdata not in inputs for output in outputs):
                self.known[key] = [Layout(tuple(out.shape), out.stride(), out.dtype) for out in outputs]
            return result
        made = tuple(torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in layouts)
        return made if len(func._schema.returns) > 1 else made[0]


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among nested arguments or results."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())


def signature(value: Any) -> Hashable:
    """An argument as far as the layout of the result may hang on it; 1, 1.0 and True are told apart."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(signature, value))
    if isinstance(value, dict):
        return tuple((name, signature(item)) for name, item in value.items())
    return type(value), value


@cache
def makes_its_own(func: Any) -> bool:
    """Whether an operation changes nothing and gives new tensors, as far as its schema tells."""
    schema = func._schema
    ends = [*schema.arguments, *schema.returns]
    return all(end.alias_info is None for end in ends) and all(str(end.type) == "Tensor" for end in schema.returns)


def on(device: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an operation; where it takes a device, on this one."""
    return func(*args, **{**kwargs, "device": torch.device(device)}) if takes_device(func) else func(*args, **kwargs)


@cache
def takes_device(func: Any) -> bool:
    """Whether an operation can be told where its result goes."""
    return any(argument.name == "device" for argument in func._schema.arguments)


def without_data(tensor: Tensor) -> Tensor:
    """The tensor on the meta device."""
    return tensor if tensor.is_meta else tensor.to("meta")
