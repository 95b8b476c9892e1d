"""What the ranks of the tests of DeepSpeed's formats do: checkpoints by real engines, and the losses that follow."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import bitsandbytes
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sharding.checkpoint import load, load_weights, trainables
from sharding.collectives import gather_objects
from sharding.engine_state import MOMENTS, adam, master, moment
from sharding.portable import Portable
from sharding.zero import ZeroSettings, build_engine

WORDS, WIDTH, ROWS = 191, 50, 4  # half of the words is more than the 4096 elements below which 8-bit Adam keeps fp32
RATE, SAVED_AT, UNTIL = 0.01, 3, 6
# What is saved: settings of `engine_of`; only: trainables only. Stage 3 comes last, as it replaces torch's linear.
CASES: dict[str, dict[str, Any]] = {
    "zero0_fp32": {"stage": 0},
    "zero0_one_group": {"stage": 0, "groups": 1, "only": True},
    "zero0_one_group_bf16": {"stage": 0, "groups": 1, "only": True, "bf16": True},
    "zero1_fp32": {"stage": 1},
    "zero1_bf16": {"stage": 1, "bf16": True},
    "zero2_fp32": {"stage": 2},
    "zero2_bf16": {"stage": 2, "bf16": True},
    "zero2_trainables": {"stage": 2, "only": True},
    "zero2_8bit": {"stage": 2, "only": True, "eight": True},
    "zero2_one_group": {"stage": 2, "groups": 1},
    "zero3_fp32": {"stage": 3},
    "zero3_bf16": {"stage": 3, "bf16": True},
    "zero3_trainables": {"stage": 3, "only": True},
    "zero3_8bit": {"stage": 3, "only": True, "eight": True},
}


class Toy(nn.Module):
    """A word predictor with all that makes a checkpoint awkward: tied, frozen and odd-sized parameters,
    buffers that are saved and one that is not.
    """

    steps: Tensor
    centre: Tensor

    def __init__(self, seed: int, base_seed: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.words.weight.data.mul_(0.1)
        self.down = nn.Linear(WIDTH, 7)
        self.up = nn.Linear(7, WIDTH)
        self.gain = nn.Parameter(torch.ones(1))
        torch.manual_seed(seed if base_seed is None else base_seed)
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.register_buffer("steps", torch.tensor(seed))
        self.register_buffer("centre", torch.randn(WIDTH) * 0.1)
        self.register_buffer("unsaved", torch.ones(3), persistent=False)
        self.out = nn.Linear(WIDTH, WORDS, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.words(ids) - self.centre.to(self.gain.dtype)
        hidden = hidden + self.base(hidden).tanh()
        hidden = hidden + self.gain * self.up(self.down(hidden).relu())
        return cross_entropy(self.out(hidden).float().flatten(0, 1), ids.roll(-1, 1).flatten())


def words(seed: int, step: int) -> Tensor:
    """This rank's rows of a global batch that does not depend on the number of ranks: ids [rows, 6]."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    batch = torch.randint(0, WORDS, (2 * ROWS, 6), generator=generator)
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def optimizer_of(model: nn.Module, *, groups: int = 2, eight: bool = False) -> Any:
    """AdamW of torch or, in 8 bits, of bitsandbytes; in two groups weight decay is for matrices only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    split = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    kind = bitsandbytes.optim.AdamW8bit if eight else torch.optim.AdamW
    return kind(split if groups == 2 else [{"params": trained, "weight_decay": 0.1}], lr=RATE)


def engine_of(model: nn.Module, *, stage: int, bf16: bool = False, universal: bool = False, **optimizer: Any) -> Any:
    """DeepSpeed's engine as its own users build it."""
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if not universal:
        zero["sub_group_size"] = 3000  # stage 3 then keeps more groups than the optimizer has
    config = {
        "train_micro_batch_size_per_gpu": 2 * ROWS // dist.get_world_size(),
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": universal},
        "zero_optimization": zero,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer_of(model, **optimizer), config=config)[0]


def train(engine: Any, seed: int, start: int, stop: int) -> list[list[float]]:
    """Loss of every rank [step][rank]."""
    found = []
    for step in range(start, stop):
        loss = engine(words(seed, step))
        engine.backward(loss)
        engine.step()
        found.append(gather_objects(loss.item()))
    return found


def save(folder: Path, seed: int) -> dict[str, Any]:
    """A checkpoint of each case after SAVED_AT steps, what the engine held then (truth.pt), and the losses of the steps
    that followed. Of some, what ds_to_universal makes of them.
    """
    followed = {}
    for name, case in CASES.items():
        only = case.get("only", False)
        engine = engine_of(Toy(seed), **{key: value for key, value in case.items() if key != "only"})
        train(engine, seed, 0, SAVED_AT)
        client = {"epoch": 4, "best": [0.25, None]}
        engine.save_checkpoint(str(folder / name), exclude_frozen_parameters=only, client_state=client)
        values = truth(engine)
        if dist.get_rank() == 0:
            torch.save(values, folder / name / "truth.pt")
            if case["stage"] and not case.get("eight"):
                to_universal(folder / name / f"global_step{SAVED_AT}", case["stage"])
        dist.barrier()
        followed[name] = train(engine, seed, SAVED_AT, UNTIL)
        engine.destroy()
    return followed


def truth(engine: Any) -> dict[str, Tensor]:
    """Masters and moments of the trainables, whole, as the engine holds them."""
    found = {}
    for name, parameter in trainables(engine.module).items():
        found[name] = master(engine, parameter)
        found.update({f"{which}.{name}": moment(engine, parameter, which) for which in MOMENTS})
    return found


def to_universal(native: Path, stage: int) -> None:
    """DeepSpeed's own converter: <folder>/universal."""
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    where = {"input_folder": str(native), "output_folder": str(native.parent / "universal")}
    ds_to_universal.main(Namespace(**options, **where, inject_missing_state=stage < 3))


def loaded(folder: Path, seed: int, jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Losses of the steps after SAVED_AT, of engines that load a checkpoint.

    Args:
        jobs: name: its `place`, `kind` and settings. Kinds: "universal" (a root, by DeepSpeed's engine), "mended" (the
            same, then each group gets a step of its own), "portable" (by our own engine).
    """
    found = {}
    for name, job in jobs.items():
        kind, place = job.pop("kind"), job.pop("place")
        model = Toy(seed + 1, base_seed=seed)  # what is frozen or a buffer is there, what is trained is not
        if kind != "portable":
            engine = engine_of(model, universal=True, **job)
            engine.load_checkpoint(place)
            for state in adam(engine).state.values() if kind == "mended" else ():
                state["step"] = state["step"].clone()
        else:
            engine = resumed(model, Path(place), **job)
        found[name] = train(engine, seed, SAVED_AT, UNTIL)
        engine.destroy()
    return found


def resumed(model: nn.Module, directory: Path, *, stage: int, bf16: bool = False, **optimizer: Any) -> Any:
    """Our own engine with a portable checkpoint in it."""
    saved = Portable(directory)
    load_weights(model, saved)
    engine = build_engine(
        model,
        optimizer_of(model, **optimizer),
        ZeroSettings(stage=stage, persistence_threshold=0),
        micro_batch=2 * ROWS // dist.get_world_size(),
        accumulation=1,
        clip_norm=1.0,
        bf16=bf16,
    )
    load(engine, saved)
    return engine
