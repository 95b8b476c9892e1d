"""What the ranks of the tests of DeepSpeed's formats do: checkpoints by real engines, and the losses that follow."""

from __future__ import annotations

import shutil
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

from sharding import portable
from sharding.collectives import gather_objects
from sharding.engine_state import MOMENTS, create_moments, master, set_adam_step, set_master, set_moment
from sharding.zero import ZeroSettings, build_engine

WORDS, WIDTH, ROWS = 191, 50, 4  # half of the words is more than the 4096 elements below which 8-bit Adam keeps fp32
RATE, SAVED_AT, UNTIL = 0.01, 3, 6
# name: ZeRO stage, bf16, trainables only, 8-bit Adam
CASES: dict[str, tuple[int, bool, bool, bool]] = {
    **{f"zero{stage}_{kind}": (stage, kind == "bf16", False, False) for stage in range(4) for kind in ("fp32", "bf16")},
    **{f"zero{stage}_trainables": (stage, False, True, False) for stage in range(4)},
    "zero2_8bit": (2, False, True, True),
    "zero3_8bit": (3, False, True, True),
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
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("centre", torch.randn(WIDTH) * 0.1)
        self.register_buffer("unsaved", torch.ones(3), persistent=False)
        self.down = nn.Linear(WIDTH, 7)
        self.up = nn.Linear(7, WIDTH)
        self.gain = nn.Parameter(torch.ones(1))
        torch.manual_seed(seed if base_seed is None else base_seed)
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
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


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups of trainables, as trainers have them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def engine_of(model: nn.Module, stage: int, *, bf16: bool = False, eight: bool = False, universal: bool = False) -> Any:
    """DeepSpeed's engine as its own users build it."""
    optimizer = (bitsandbytes.optim.AdamW8bit if eight else torch.optim.AdamW)(groups(model), lr=RATE)
    config = {
        "train_micro_batch_size_per_gpu": 2 * ROWS // dist.get_world_size(),
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": universal},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": 3000,
        },
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


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
    for name, (stage, bf16, only, eight) in CASES.items():
        model = Toy(seed)
        engine = engine_of(model, stage, bf16=bf16, eight=eight)
        train(engine, seed, 0, SAVED_AT)
        client = {"epoch": 4, "best": [0.25, None]}
        engine.save_checkpoint(str(folder / name), exclude_frozen_parameters=only, client_state=client)
        truth = held(engine)
        if dist.get_rank() == 0:
            torch.save(truth, folder / name / "truth.pt")
            if stage and not eight:
                to_universal(folder / name / f"global_step{SAVED_AT}", stage)
        dist.barrier()
        followed[name] = train(engine, seed, SAVED_AT, UNTIL)
        engine.destroy()
    return followed


def held(engine: Any) -> dict[str, Tensor]:
    """Masters and moments of the trainables, whole, by the engine's own functions."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            found[name] = master(engine, parameter).clone()
    return found


def to_universal(native: Path, stage: int) -> None:
    """DeepSpeed's own converter: <folder>/universal."""
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    where = {"input_folder": str(native), "output_folder": str(native.parent / "universal")}
    ds_to_universal.main(Namespace(**options, **where, inject_missing_state=stage < 3))
