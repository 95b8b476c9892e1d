"""Reads what DeepSpeed's `engine.save_checkpoint` writes, at any ZeRO stage and number of ranks.

<root>/latest, <root>/<tag>/                                  of it is read
  mp_rank_00_model_states.pt                                  stages 0 to 2: names, buffers, frozen weights
  zero_pp_rank_<rank>_mp_rank_00_model_states.pt              stage 3: the same, frozen weights cut over the ranks
  (bf16_)zero_pp_rank_<rank>_mp_rank_00_optim_states.pt       stages 1 to 3: each rank's flat fp32 masters and moments

Which elements of a flat partition are whose: stages 1 and 2 say it (param_slice_mappings), at stage 3 each rank holds
the next ceil(elements / ranks) of every parameter, one parameter after another (runtime/zero/stage3.py). A parameter is
put together only when it is read. Unlike DeepSpeed's zero_to_fp32 this keeps the frozen weights of stage 1.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharding import eight_bit
from sharding.engine_state import MOMENTS
from sharding.errors import UserError
from tools.convert import deepspeed_stage0
from tools.convert.deepspeed_files import ANOTHER, Model, check_ranks, folder_of, laid_out, load, open_model
from tools.convert.held import Held, Tensors
from tools.convert.mapped import Mapped

OPTIMIZER_FILE = re.compile(r"(?P<kind>bf16_|fp16_|)zero_pp_rank_\d+_mp_rank_00_optim_states\.pt")
EIGHT_BIT = "__bnb_optimizer_quant_state__"  # where bitsandbytes wraps its state
State = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Elements of a parameter: `count` from `start` on in a flat partition."""

    rank: int
    group: int
    start: int
    count: int


@dataclass(frozen=True)
class Partition:
    """What one rank's file holds: of each group the flat fp32 masters, Adam's state of them (none before a step), and
    (stages 1 and 2) the addresses of parameters in it; the ZeRO stage.
    """

    masters: list[Tensor]
    states: list[State]
    addresses: list[dict[str, Any]]
    stage: int


def detect(path: Path) -> bool:
    """Whether `path` is such a checkpoint (its root or the folder of a tag)."""
    try:
        folder = folder_of(path, "latest")
    except UserError:
        return False
    return not (folder / "zero").is_dir() and next(folder.glob("*mp_rank_*_model_states.pt"), None) is not None


def read(path: Path, *, say: Callable[[str], None] = warnings.warn) -> Held:
    """Opens a checkpoint: fp32 masters of the trained parameters, buffers and (if they were saved) frozen weights in
    their own dtype, Adam's moments. Tensors may be views of the mapped files.

    Args:
        path: the root, whose `latest` is followed, or the folder of a tag.
        say: told what cannot be kept.

    Returns:
        `state` holds adam_step, zero_stage, world_size, global_steps; "tied": other names of parameters and the name
        each is kept by; "frozen": names of the weights that were not trained; "client_state".

    Raises:
        UserError: a file is missing, damaged, foreign or of another world size, by name.
    """
    folder = folder_of(path, "latest")
    model = open_model(folder)
    with laid_out(model.path):
        if not model.shapes:
            return deepspeed_stage0.read(model, say)
        mapped = Mapped()
        shapes = {name: shape for group in model.shapes for name, shape in group.items()}
        untrained, frozen = model.untrained(set(shapes), mapped)
        state: State = {**model.state(say), "tied": model.tied, "frozen": frozen}
        paths = optimizer_files(folder, model.common["dp_world_size"])
    partitions = [open_partition(file, model) for file in paths]
    step = adam_step(paths, partitions, say)
    with laid_out(paths[0]):
        places = cut_places(model, len(paths)) if model.sharded else addressed_places(partitions)
    for name, shape in shapes.items():
        check_places(paths, name, shape, places.get(name, []), partitions)

    def weight(name: str) -> Tensor:
        if name not in shapes:
            return untrained.read(name)
        parts = [partitions[at.rank].masters[at.group][at.start : at.start + at.count] for at in places[name]]
        return mapped.joined(parts, shapes[name]).float()

    moments = {f"{which}.{name}": (which, name) for which in (MOMENTS if step else ()) for name in shapes}

    def moment(full: str) -> Tensor:
        which, name = moments[full]
        parts = [part_of(partitions[at.rank].states[at.group], which, at) for at in places[name]]
        return mapped.joined(parts, shapes[name]).float()

    weights = Tensors(
        {**{name: list(shape) for name, shape in shapes.items()}, **untrained.shapes},
        {**dict.fromkeys(shapes, torch.float32), **untrained.dtypes},
        weight,
    )
    sizes = {full: list(shapes[name]) for full, (_, name) in moments.items()}
    state.update({"adam_step": step, "zero_stage": 3 if model.sharded else partitions[0].stage})
    return Held(weights, Tensors(sizes, dict.fromkeys(sizes, torch.float32), moment), state)


def part_of(state: State, which: str, at: Place) -> Tensor:
    """A moment's elements at a place."""
    if which in state:
        return state[which].view(-1)[at.start : at.start + at.count]
    return eight_bit.read(state[EIGHT_BIT], which, at.start, at.count)


def optimizer_files(folder: Path, world: int) -> list[Path]:
    """The files of all ranks, in their order.

    Raises:
        UserError: one is missing, or one more is there.
    """
    found = [match for path in folder.iterdir() if (match := OPTIMIZER_FILE.fullmatch(path.name))]
    kind = min((match["kind"] for match in found), default="")
    names = [f"{kind}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world)]
    check_ranks(folder, names, {match.string for match in found})
    return [folder / name for name in names]


def open_partition(path: Path, model: Model) -> Partition:
    """Opens one rank's file.

    Raises:
        UserError: it is damaged, foreign, or of another checkpoint than the model's file.
    """
    held = load(path)
    with laid_out(path):
        held = held["optimizer_state_dict"]
        count = held["partition_count"]
        count = max(count) if isinstance(count, list) else count
        if count != model.common["dp_world_size"]:
            wrote = model.common["dp_world_size"]
            raise UserError(str(path), f"was written by {count} ranks, {model.path.name} by {wrote}", ANOTHER)
        if "ds_zero_partition_groups" in held:
            raise UserError(str(path), "holds experts that other ranks share in other ways, which is not read", ANOTHER)
        optimizer = held["optimizer_state_dict" if model.sharded else "base_optimizer_state"]
        if isinstance(optimizer, list):
            raise UserError(
                str(path), "is an elastic checkpoint of ZeRO, which is not read", "Save it without elastic_checkpoint."
            )
        masters = held["fp32_flat_groups" if model.sharded else "single_partition_of_fp32_groups"]
        numbers = range(len(masters)) if model.sharded else [group["params"][0] for group in optimizer["param_groups"]]
        states = [dict(optimizer["state"].get(number, {})) for number in numbers]
        for group in optimizer["param_groups"]:
            for number in group["params"] if "step" in group else ():  # where some of DeepSpeed's own optimizers count
                states[number].setdefault("step", group["step"])
        return Partition(masters, states, held.get("param_slice_mappings") or [], int(held.get("zero_stage", 1)))


def adam_step(paths: list[Path], partitions: list[Partition], say: Callable[[str], None]) -> int:
    """Number of Adam's updates; 0 where no moments can be read.

    Raises:
        UserError: it differs between parts of the model.
    """
    steps, other = {}, set()
    for path, partition in zip(paths, partitions, strict=True):
        with laid_out(path):
            for master, state in zip(partition.masters, partition.states, strict=True):
                if state and not is_adam(state, master.numel()):
                    other.update(state.get(EIGHT_BIT, state))
                elif master.numel():
                    steps[int(state["step"]) if state else 0] = path
    if other:
        say(f"the optimizer's state is left out: {', '.join(sorted(other))} are not all of AdamW")
        return 0
    if len(steps) > 1:
        most = max(steps)
        problem = f"holds parts of the model that have been updated {most} times, others {min(steps)} times"
        raise UserError(str(steps[most]), problem, "One count for all is needed: start the optimizer anew.")
    return max(steps, default=0)


def is_adam(state: State, elements: int) -> bool:
    """Whether a partition's state is that of AdamW, in fp32 or in 8 bits, and of nothing else."""
    if MOMENTS[0] in state:
        return state.keys() == {"step", *MOMENTS} and all(state[name].numel() >= elements for name in MOMENTS)
    known, codes = state.get(EIGHT_BIT, {}), ("state1", "state2")
    if not known.keys() >= set(codes) or any(known[name].numel() < elements for name in codes):
        return False
    scaling = {f"{name}{number}" for name in ("qmap", "absmax") for number in (1, 2)}
    return known.keys() - codes == (scaling if known["state1"].dtype == torch.uint8 else set())


def addressed_places(partitions: list[Partition]) -> dict[str, list[Place]]:
    """Where each parameter lies at stages 1 and 2, as the files tell."""
    places: dict[str, list[Place]] = {}
    for rank, partition in enumerate(partitions):
        for group, addresses in enumerate(partition.addresses):
            for name, address in addresses.items():
                places.setdefault(name, []).append(Place(rank, group, address.start, address.numel))
    return places


def cut_places(model: Model, world: int) -> dict[str, list[Place]]:
    """Where each parameter lies at stage 3; what pads the last ranks is left out."""
    places: dict[str, list[Place]] = {}
    for group, shapes in enumerate(model.shapes):
        start = 0
        for name, shape in shapes.items():
            most = math.ceil(shape.numel() / world)
            counts = [max(min(most, shape.numel() - most * rank), 0) for rank in range(world)]
            places[name] = [Place(rank, group, start, count) for rank, count in enumerate(counts) if count]
            start += most
    return places


def check_places(
    paths: list[Path], name: str, shape: torch.Size, places: list[Place], partitions: list[Partition]
) -> None:
    """Whether the places hold a parameter whole.

    Raises:
        UserError: they do not.
    """
    for at in places:
        groups = partitions[at.rank].masters
        held = groups[at.group].numel() if at.group < len(groups) else 0
        if not 0 <= at.start <= at.start + at.count <= held:
            raise UserError(
                str(paths[at.rank]), f"holds {held} elements where {name} ends at {at.start + at.count}", ANOTHER
            )
    found = sum(at.count for at in places)
    if found != shape.numel():
        where = str(paths[places[-1].rank] if places else paths[0])
        raise UserError(where, f"with the others holds {found} elements of {name}, which has {shape.numel()}", ANOTHER)
