"""Files of DeepSpeed checkpoints, opened without DeepSpeed and without running what they hold.

They are pickles. Only tensors, plain values and the few classes that DeepSpeed itself puts there are let in, and
stand-ins take the place of those; tensors stay in their file until they are read.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from sharding.errors import UserError
from tools.convert.held import Tensors
from tools.convert.mapped import Mapped

ANOTHER = "Use another checkpoint of that run."
OURS = "dist_train"  # where `state` lies among what a client adds to a checkpoint
# What DeepSpeed itself writes beside the client's state (runtime/engine.py, _common_checkpoint_state).
DEEPSPEED = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps",
    "global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version",
    "universal_checkpoint_info",
}  # fmt: skip
MODEL_FILE = re.compile(r"(zero_pp_rank_(?P<rank>\d+)_)?mp_rank_00_model_states\.pt")
MOST_RANKS = 100_000  # no machine has more
SPLIT_MODEL = "splits the model itself over ranks (tensor, pipeline or expert parallelism), which convert does not read"


class Fragment:
    """Stands in for DeepSpeed's fragment_address: `numel` elements from `start` on of a rank's flat partition."""

    start: int
    numel: int


class Ignored:
    """Stands in for loss scalers."""


# A pickle that names a global gets what stands beside it here, never what is installed.
GLOBALS: list[Any] = [
    (Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Ignored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
]


def load(path: Path) -> Any:
    """What a file holds; its tensors are mapped, not read.

    Raises:
        UserError: it is missing or damaged, or it needs code of others to be opened.
    """
    with safe_globals(GLOBALS):
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except FileNotFoundError:
            raise UserError(str(path), "is missing", ANOTHER) from None
        except pickle.UnpicklingError as error:
            foreign = foreign_globals(path)
            reason = (
                f"names {', '.join(foreign)}: opening it would run code" if foreign else f"cannot be read ({error})"
            )
        except Exception as error:  # torch raises many kinds
            raise UserError(str(path), f"cannot be read ({str(error).splitlines()[0]})", ANOTHER) from None
    raise UserError(str(path), reason, "Save it again with tensors, numbers and text only (see client_state).")


def foreign_globals(path: Path) -> list[str]:
    """Names of what a pickle would import beyond what is let in."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # it is not even a pickle
        return []


@contextmanager
def laid_out(path: Path) -> Iterator[None]:
    """Turns what goes wrong in taking apart the contents of a file into an error that names it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        problem = f"is not laid out as DeepSpeed lays it out ({what})"
        raise UserError(
            str(path), problem, "Is it written by engine.save_checkpoint of DeepSpeed 0.10 or later?"
        ) from None


def folder_of(path: Path, pointer: str) -> Path:
    """The folder of a tag: `path` itself, or the one that the file `pointer` in it names.

    Raises:
        UserError: it is neither.
    """
    if next(path.glob("*_model_states.pt"), None):
        return path
    try:
        tag = (path / pointer).read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise UserError(
            str(path), f"holds neither *_model_states.pt nor a file {pointer} that names a tag", "Give another folder."
        ) from None
    if not stays(tag) or not (path / tag).is_dir():
        raise UserError(
            str(path / pointer), f"names {tag[:80]!r}, and there is no such folder", "Give the folder of a tag."
        )
    return path / tag


def stays(name: str) -> bool:
    """Whether a name is one of something in a folder, and leads nowhere else."""
    return Path(name).name == name and name not in ("", "..")


@dataclass(frozen=True)
class Model:
    """What the files *_model_states.pt hold.

    Args:
        path: of the first rank.
        common: its contents.
        ranks: contents of the files of all ranks that cut the parameters (stage 3), else of one.
        sharded: whether parameters are cut (stage 3).
    """

    path: Path
    common: dict[str, Any]
    ranks: list[dict[str, Any]]
    sharded: bool

    @property
    def shapes(self) -> list[dict[str, torch.Size]]:
        """Shapes of the trained parameters by name, in the optimizer's groups; none at stage 0."""
        return self.common["param_shapes"] or []

    @property
    def tied(self) -> dict[str, str]:
        """Other names of parameters, and the name each is kept by."""
        if self.common["shared_params"] is not None:
            return dict(self.common["shared_params"])
        kept: dict[tuple[Any, ...], str] = {}  # stage 0 tells it only by where the tensors lie
        module = self.common["module"]
        places = {name: (value.data_ptr(), value.shape) for name, value in module.items() if value.numel()}
        return {name: kept[place] for name, place in places.items() if kept.setdefault(place, name) != name}

    def untrained(self, trained: set[str], mapped: Mapped) -> tuple[Tensors, list[str]]:
        """Buffers and frozen weights, as far as they were saved; the names of the latter."""
        module, buffers, tied = self.common["module"], set(self.common["buffer_names"]), self.tied
        found: dict[str, Callable[[], Tensor]] = {}
        shapes: dict[str, list[int]] = {}
        dtypes: dict[str, torch.dtype] = {}
        cut = (self.common["frozen_param_shapes"] or {}) if self.sharded else {}
        for name, value in module.items():
            if name not in trained | tied.keys() | cut.keys():
                found[name] = partial(mapped.joined, [value], value.shape)
                shapes[name], dtypes[name] = list(value.shape), value.dtype
        for name, shape in cut.items():
            parts = [rank["frozen_param_fragments"][name] for rank in self.ranks]
            if sum(part.numel() for part in parts) < shape.numel():
                raise ValueError(f"{name} has fewer elements than its shape {list(shape)}")
            shapes[name], dtypes[name] = list(shape), parts[0].dtype
            found[name] = partial(mapped.joined, parts, shape)  # the last one is padded
        return Tensors(shapes, dtypes, lambda name: found[name]()), [name for name in found if name not in buffers]

    def state(self, say: Callable[[str], None]) -> dict[str, Any]:
        """`state` as it was put there by `deepspeed_universal.write`, else what DeepSpeed tells. What a client added
        is kept as far as JSON can hold it.
        """
        if isinstance(self.common.get(OURS), dict):
            return dict(self.common[OURS])
        state = {name: self.common[name] for name in ("global_steps", "global_samples")}
        state["world_size"] = self.common["dp_world_size"]
        client = {str(name): value for name, value in self.common.items() if name not in DEEPSPEED}
        lost = [name for name, value in client.items() if not plain(value)]
        if lost:
            say(f"left out of client_state: {', '.join(sorted(lost))} (only numbers, text and lists of them are kept)")
        return {**state, "client_state": {name: value for name, value in client.items() if name not in lost}}


def plain(value: Any) -> bool:
    """Whether JSON can hold it."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def open_model(folder: Path) -> Model:
    """Opens the files *_model_states.pt of a tag's folder.

    Raises:
        UserError: one is missing or damaged, or cannot be read here.
    """
    found = {path: MODEL_FILE.fullmatch(path.name) for path in sorted(folder.glob("*_model_states.pt"))}
    other = next((path for path, match in found.items() if match is None), None)
    if other is not None:
        raise UserError(str(other), SPLIT_MODEL, "Merge the model's parts with the tools that made it.")
    if not found:
        raise UserError(str(folder), "holds no *_model_states.pt", ANOTHER)
    whole = folder / "mp_rank_00_model_states.pt"
    path = whole if whole in found else folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    common = load(path)
    with laid_out(path):
        ranks = [common]
        needed = {"module", "buffer_names", "param_shapes", "shared_params", "frozen_param_shapes", "global_steps"}
        if needed - common.keys() or not 0 < common["dp_world_size"] <= MOST_RANKS:
            raise KeyError(*sorted(needed - common.keys())[:1] or ("dp_world_size",))
        if common["mp_world_size"] != 1:
            raise UserError(str(path), SPLIT_MODEL, "Merge the model's parts with the tools that made it.")
        if path != whole:
            names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(common["dp_world_size"])]
            check_ranks(folder, names, {file.name for file in found})
            ranks += [load(folder / name) for name in names[1:]]
    return Model(path, common, ranks, sharded=path != whole)


def check_ranks(folder: Path, expected: list[str], found: set[str]) -> None:
    """Whether there is one file of each rank.

    Raises:
        UserError: one is missing, or one more is there.
    """
    missing = [name for name in expected if name not in found]
    if missing:
        here = len(found & set(expected))
        problem = f"is missing: {len(expected)} ranks wrote the checkpoint, {here} of their files are here"
        raise UserError(str(folder / missing[0]), problem, "Copy the files of all nodes into one folder.")
    more = sorted(found - set(expected))
    if more:
        problem = (
            f"is of a rank too many: {len(expected)} wrote the checkpoint (left by an earlier save of more ranks?)"
        )
        raise UserError(str(folder / more[0]), problem, "Move files that belong to another save out of the folder.")
