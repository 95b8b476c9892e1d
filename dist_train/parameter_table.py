"""Who holds which parameters: a table of the model's parts before the first step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.table import Table
from torch import Tensor, nn

BITS = {"Linear8bitLt": "int8", "Linear4bit": "nf4"}  # layers of bitsandbytes, and what their weights are
GIB = 2**30


@dataclass
class Row:
    """Parameters of one part that are held alike. `count`: of all ranks; `bytes`: on this rank between two steps."""

    part: str
    trainable: bool
    dtype: str
    held: str
    device: str
    count: int = 0
    bytes: int = 0


def parameter_rows(model: nn.Module) -> list[Row]:
    """The rows of a DoubleFlow, plain or in an engine; quantised and sharded parameters count whole."""
    rows: dict[tuple[Any, ...], Row] = {}
    seen: set[int] = set()
    for name, module, parameter in held_parameters(model):
        if id(parameter) in seen:  # tied
            continue
        seen.add(id(parameter))
        own = parameter.ds_tensor if is_sharded(parameter) else parameter.data
        beside = {tensor.untyped_storage().data_ptr(): tensor for tensor in statistics(module, parameter)}
        beside.pop(own.untyped_storage().data_ptr(), None)
        key = (
            part_of(name),
            parameter.requires_grad,
            dtype_of(module, parameter),
            f"1/{dist.get_world_size()} per rank" if is_sharded(parameter) else "whole",
            str(own.device),
        )
        row = rows.setdefault(key, Row(*key))
        row.count += count_of(module, parameter)
        # What ZeRO-3 leaves whole is there from the first forward on.
        values = own.numel() if is_sharded(parameter) else getattr(parameter, "ds_numel", parameter.numel())
        row.bytes += values * own.element_size() + sum(map(size_of, beside.values()))
    return list(rows.values())


def held_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Name, module that holds it, and parameter, in the model's order."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{prefix}.{name}", module, parameter


def part_of(name: str) -> str:
    """The part of the model a parameter belongs to."""
    return "imagination" if "_imagination." in name else name.split(".", maxsplit=1)[0]


def dtype_of(module: nn.Module, parameter: Tensor) -> str:
    """Its type, by its own name where it is quantised."""
    # Not module.weight: a weight norm would compute it, and under ZeRO-3 gather it from the other ranks.
    quantised = BITS.get(type(module).__name__) if parameter is module._parameters.get("weight") else None
    return quantised or str(parameter.dtype).removeprefix("torch.")


def count_of(module: Any, parameter: Any) -> int:
    """Number of values, also where two share a byte or other ranks hold them."""
    if dtype_of(module, parameter) == "nf4":
        return module.in_features * module.out_features
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def is_sharded(parameter: Any) -> bool:
    """Whether ZeRO-3 spreads it over the ranks; it leaves small ones whole."""
    return hasattr(parameter, "ds_id") and not parameter.ds_persist


def statistics(module: Any, parameter: Tensor) -> list[Tensor]:
    """What bitsandbytes keeps beside a quantised weight: scales, and under ZeRO-3 the whole int8 matrix."""
    kind = dtype_of(module, parameter)
    if kind == "int8":
        kept = chain.from_iterable((owner.CB, owner.SCB) for owner in (module.weight, module.state))
        return [tensor for tensor in kept if tensor is not None]
    if kind == "nf4":
        state = module.weight.quant_state
        return [state.absmax] if state.state2 is None else [state.absmax, state.state2.absmax]
    return []


def size_of(tensor: Tensor) -> int:
    """Bytes."""
    return tensor.numel() * tensor.element_size()


def parameter_table(rows: list[Row]) -> Table:
    """The rows as a table to print."""
    table = Table(title="Parameters", show_footer=True)
    trained = sum(row.count for row in rows if row.trainable)
    columns = {
        "part": "all",
        "": f"{trained:,} trained",
        "parameters": f"{sum(row.count for row in rows):,}",
        "type": "",
        "held": "",
        "device": "",
        "GiB per rank": f"{sum(row.bytes for row in rows) / GIB:.3f}",
    }
    for name, footer in columns.items():
        table.add_column(name, footer=footer, justify="right" if name in ("parameters", "GiB per rank") else "left")
    for row in rows:
        state = "trained" if row.trainable else "frozen"
        table.add_row(row.part, state, f"{row.count:,}", row.dtype, row.held, row.device, f"{row.bytes / GIB:.3f}")
    return table


def write_parameters(rows: list[Row], path: Path) -> None:
    """parameters.json: the rows, and their sums."""
    total = {
        "parameters": sum(row.count for row in rows),
        "trainable": sum(row.count for row in rows if row.trainable),
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(total, indent=1))
