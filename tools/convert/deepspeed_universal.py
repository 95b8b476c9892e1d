"""DeepSpeed's universal checkpoints: reads what `ds_to_universal` writes, and writes what its engines load.

<root>/latest_universal, <root>/<tag>/
  zero/<parameter>/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt     whole tensors
  zero/optimizer_state.pt                                          hyperparameters of the optimizer's groups
  mp_rank_00_model_states.pt                                       looked for by stages 1 and 2
  zero_pp_rank_0_mp_rank_00_model_states.pt                        looked for by stage 3

A folder of `ds_to_universal` has one of the two last files and one of two layouts of optimizer_state.pt, so that it
loads either below stage 3 or there. Those written here have both and load at stages 1 to 3. Their groups have no
hyperparameters: the engine that loads them keeps its own (stage 3 would give all groups those of the first).

DeepSpeed 0.19.8 itself gets wrong what no file can mend: frozen weights and buffers are passed over, stage 0 fails, and
stage 3 hands one and the same step tensor to all groups of parameters, which torch's optimizers then count up once per
group. After such a load: `for state in optimizer.state.values(): state["step"] = state["step"].clone()`.
"""

from __future__ import annotations

import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharding.engine_state import MOMENTS
from sharding.errors import UserError
from sharding.portable import flush, writing
from tools.convert.deepspeed_files import ANOTHER, OURS, folder_of, laid_out, load, open_model, stays
from tools.convert.held import Held, Tensors
from tools.convert.mapped import Mapped
from tools.convert.safetensors_shards import unseen

LATEST = "latest_universal"
NOT_LOADED = "DeepSpeed's universal load passes over {}: give the engine a model that has them already"


def detect(path: Path) -> bool:
    """Whether `path` is such a checkpoint: the folder of a tag, or a root without checkpoints of the other kind."""
    try:
        folder = folder_of(path, LATEST)
    except UserError:
        return False
    return (folder / "zero").is_dir() and not (path / "latest").exists()


def read(path: Path, *, say: Callable[[str], None] = warnings.warn) -> Held:
    """Opens a universal checkpoint.

    Args:
        path: the root, whose `latest_universal` is followed, or the folder of a tag.
        say: told what cannot be kept.

    Returns:
        As `deepspeed_native.read`.

    Raises:
        UserError: a file is missing, damaged or foreign, by name.
    """
    folder = folder_of(path, LATEST)
    zero = folder / "zero"
    model = open_model(folder)
    with laid_out(model.path):
        shapes = {plain_name(zero, name): shape for group in model.shapes for name, shape in group.items()}
        frozen_shapes = dict(model.common["frozen_param_shapes"] or {})
        untrained, frozen = model.untrained(set(shapes), Mapped())
        state: dict[str, Any] = {**model.state(say), "tied": model.tied}
    step = adam_step(zero, list(shapes))
    trained = {name: File(zero / name / "fp32.pt", shape) for name, shape in shapes.items()}
    # Frozen weights of a folder written here lie like the others.
    more = {name: shape for name, shape in frozen_shapes.items() if name not in untrained.shapes}
    other = {name: File(zero / plain_name(zero, name) / "fp32.pt", shape) for name, shape in more.items()}
    moments = {
        f"{which}.{name}": File(zero / name / f"{which}.pt", shape)
        for which in (MOMENTS if step else ())
        for name, shape in shapes.items()
    }
    for file in (*trained.values(), *other.values(), *moments.values()):
        if not file.path.is_file():
            raise UserError(str(file.path), "is missing", ANOTHER)

    def weight(name: str) -> Tensor:
        if name in trained:
            return trained[name].read().float()
        return other[name].read() if name in other else untrained.read(name)

    weights = Tensors(
        {**{name: list(file.shape) for name, file in (trained | other).items()}, **untrained.shapes},
        {
            **dict.fromkeys(trained, torch.float32),
            **{name: file.read().dtype for name, file in other.items()},
            **untrained.dtypes,
        },
        weight,
    )
    sizes = {name: list(file.shape) for name, file in moments.items()}
    held_moments = Tensors(sizes, dict.fromkeys(sizes, torch.float32), lambda name: moments[name].read().float())
    return Held(weights, held_moments, {**state, "adam_step": step, "frozen": [*frozen, *other]})


@dataclass(frozen=True)
class File:
    """One tensor's file."""

    path: Path
    shape: torch.Size

    def read(self) -> Tensor:
        """The tensor, mapped. Converters of stage 3 write it flat, without a dict around it."""
        held = load(self.path)
        with laid_out(self.path):
            return (held["param"] if isinstance(held, dict) else held).view(self.shape)


def plain_name(zero: Path, name: str) -> str:
    """A parameter's name, which is to name a folder.

    Raises:
        UserError: it would lead elsewhere.
    """
    if not stays(name):
        raise UserError(str(zero / name), "is no name of a parameter that a folder can have", "Rename the parameter.")
    return name


def adam_step(zero: Path, names: list[str]) -> int:
    """Number of Adam's updates; 0 before the first.

    Raises:
        UserError: it differs between parameters.
    """
    files = [file for name in names if (file := zero / name / "step.pt").is_file()]
    steps = {}
    for file in files:
        held = load(file)
        with laid_out(file):
            steps[int(held)] = file
    if not files and any((zero / name / f"{MOMENTS[0]}.pt").is_file() for name in names):  # made of stage 3
        file = zero / "optimizer_state.pt"
        held = load(file)
        with laid_out(file):
            steps[int(held["optimizer_state_dict"]["state"][0]["step"])] = file
    if len(steps) > 1:
        problem = f"says {max(steps)} updates, other parameters have had {min(steps)}"
        raise UserError(str(steps[max(steps)]), problem, "One count for all is needed: start the optimizer anew.")
    return max(steps, default=0)


def write(
    path: Path,
    held: Held,
    *,
    say: Callable[[str], None] = warnings.warn,
    on_tensor: Callable[[str, int], None] = unseen,
) -> Path:
    """Writes a universal checkpoint, whole or not at all, tensor by tensor.

    What has moments is trained; before the first update all floating-point weights but the frozen ones are, with
    moments of zero. Of the rest, those that `state` calls frozen are frozen weights, the others buffers.

    Args:
        path: the root, which must not exist.
        say: told what DeepSpeed will not load.
        on_tensor: called with name and bytes after each tensor.

    Returns:
        The folder of the tag, global_step<updates>, which `latest_universal` in the root names.

    Raises:
        UserError: the root exists, or a name cannot be that of a folder.
        OSError: the disk refuses it.
    """
    if path.exists():
        raise UserError(str(path), "exists", "Name a folder that does not.")
    step = int(held.state.get("adam_step", 0))
    frozen = [name for name in held.state.get("frozen", ()) if name in held.weights.shapes]
    started = bool(held.moments.shapes)
    trained = [
        name
        for name, dtype in held.weights.dtypes.items()
        if (
            f"{MOMENTS[0]}.{name}" in held.moments.shapes if started else dtype.is_floating_point and name not in frozen
        )
    ]
    buffers = [name for name in held.weights.shapes if name not in {*frozen, *trained}]
    place = writing(path)
    shutil.rmtree(place, ignore_errors=True)
    folder = place / f"global_step{step}"
    zero = folder / "zero"
    zero.mkdir(parents=True)
    try:
        for name in (*trained, *frozen):
            (zero / plain_name(zero, name)).mkdir()
            weight = held.weights.read(name)
            put(zero / name / "fp32.pt", {"param": own(weight.float() if name in trained else weight), "cat_dim": 0})
            for which in MOMENTS if name in trained else ():
                moment = held.moments.read(f"{which}.{name}") if started else torch.zeros(weight.shape)
                put(zero / name / f"{which}.pt", {"param": own(moment.float()), "cat_dim": 0})
            if name in trained:
                put(zero / name / "step.pt", torch.tensor(float(step)))  # the kind that torch's optimizers keep
            on_tensor(name, weight.nbytes)
        put(zero / "optimizer_state.pt", optimizer_state(len(trained), step))
        model = model_state(held, trained, frozen, buffers)
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
            put(folder / name, model)
        (place / LATEST).write_text(folder.name)
        for made in (place / LATEST, zero, folder, place):
            flush(made)
        place.rename(path)
        flush(path.parent)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    for what, names in (("frozen weights", frozen), ("buffers", buffers)):
        if names:
            say(NOT_LOADED.format(f"{what} ({len(names)}, first {min(names)})"))
    return path / folder.name


def own(tensor: Tensor) -> Tensor:
    """A tensor that shares its memory with none: torch.save would write all of what it is a view of."""
    return tensor.clone(memory_format=torch.contiguous_format)


def put(path: Path, value: Any) -> None:
    """Writes a file and forces it to disk."""
    torch.save(value, path)
    flush(path)


def optimizer_state(parameters: int, step: int) -> dict[str, Any]:
    """Both layouts of zero/optimizer_state.pt. Below stage 3 only as many groups are loaded as are listed here, and an
    engine has at most one per parameter.
    """
    groups: list[dict[str, Any]] = [{"params": []} for _ in range(parameters)]
    return {
        "ds_version": version("deepspeed"),
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": groups[:1]},
    }


def model_state(held: Held, trained: list[str], frozen: list[str], buffers: list[str]) -> dict[str, Any]:
    """What DeepSpeed's engine looks up while it loads, and what `read` needs."""

    def shapes(names: list[str]) -> OrderedDict[str, torch.Size]:
        return OrderedDict((name, torch.Size(held.weights.shapes[name])) for name in names)

    return {
        "module": OrderedDict((name, own(held.weights.read(name))) for name in buffers),
        "buffer_names": buffers,
        "optimizer": None,
        "param_shapes": [shapes(trained)],
        "frozen_param_shapes": shapes(frozen),
        "frozen_param_fragments": None,
        "shared_params": dict(held.state.get("tied", {})),
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": int(held.state.get("global_steps", held.state.get("adam_step", 0))),
        "global_samples": int(held.state.get("global_samples", 0)),
        "dp_world_size": int(held.state.get("world_size", 1)),
        "mp_world_size": 1,
        "ds_version": version("deepspeed"),
        OURS: dict(held.state),
    }
