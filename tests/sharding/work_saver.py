"""What the ranks of test_saver.py do."""

from __future__ import annotations

import resource
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from dist_train.optimizer import OptimizerSettings, build_optimizer
from sharding import checkpoint
from sharding.errors import UserErrors
from sharding.portable import Portable
from sharding.retention import step_directory
from sharding.saver import CheckpointSettings, Saver
from sharding.zero import ZeroSettings, build_engine

ROWS = 8  # of a step, over all ranks


class Net(nn.Module):
    """Tensors of many sizes, one above the 4096 elements from which moments are kept in 8 bits; a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(67, 71)
        self.frozen = nn.Linear(71, 71).requires_grad_(False)
        self.last = nn.Linear(71, 3, bias=False)
        self.register_buffer("scale", torch.rand(71))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.frozen(self.first(x)) * self.scale)).square().mean()


def engine_of(seed: int, optimizer: str, stage: int, saved: Path | None = None) -> Any:
    """An engine around Net, continued from a checkpoint if one is given."""
    torch.manual_seed(seed)
    model = Net()
    opened = None if saved is None else Portable(saved)
    if opened is not None:
        torch.manual_seed(seed + 1)
        for parameter in checkpoint.trainables(model).values():
            nn.init.normal_(parameter)
        nn.init.zeros_(model.get_buffer("scale"))
        checkpoint.load_weights(model, opened)
    settings = OptimizerSettings.model_validate({"name": optimizer, "learning_rate": 0.01, "weight_decay": 0.1})
    engine = build_engine(
        model,
        build_optimizer(settings, checkpoint.trainables(model).values()),
        ZeroSettings(stage=stage, persistence_threshold=0),
        micro_batch=ROWS // dist.get_world_size(),
        accumulation=1,
        clip_norm=0.0,
        bf16=False,
    )
    if opened is not None:
        checkpoint.load(engine, opened)
    return engine


def steps(engine: Any, seed: int, first: int, count: int) -> list[float]:
    """Losses of steps over the same rows at any world size."""
    losses = []
    for step in range(first, first + count):
        rows = np.random.default_rng([seed, step]).normal(size=(ROWS, 67)).astype(np.float32)
        share = ROWS // dist.get_world_size()
        loss = engine(torch.from_numpy(rows[dist.get_rank() * share :][:share]))
        engine.backward(loss)
        engine.step()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(whole.item() / dist.get_world_size())
    return losses


def elastic(folder: Path, seed: int, writes: list[Any], reads: list[str]) -> dict[str, Any]:
    """Trains, saves and continues under each (stage, optimizer) of `writes`; continues each checkpoint of `reads`
    under each of them. Returns the losses of three steps after the save.
    """
    found: dict[str, Any] = {}
    world = dist.get_world_size()
    for stage, optimizer in writes:
        engine = engine_of(seed, optimizer, stage)
        steps(engine, seed, 0, 3)
        name = f"{world} {stage} {optimizer}"
        Saver(folder / name, CheckpointSettings(asynchronous=False), {}).save(engine, 3, {})
        found[name] = steps(engine, seed, 3, 3)
        engine.destroy()
    for (stage, optimizer), read in product(writes, reads):
        engine = engine_of(seed, optimizer, stage, step_directory(folder / read, 3))
        found[f"{read} -> {world} {stage} {optimizer}"] = steps(engine, seed, 3, 3)
        engine.destroy()
    return found


def behind(folder: Path, seed: int) -> dict[str, Any]:
    """Saves while the training goes on; once rank 1 may not write files of more than 1000 bytes."""
    root = folder / "run"
    engine = engine_of(seed, "adamw", 2)
    saver = Saver(root, CheckpointSettings(keep_last=1), {})
    undisturbed = {}
    for step in (1, 2):
        steps(engine, seed, step, 1)
        saver.save(engine, step, {}, ["best"] if step == 1 else [])
        undisturbed[step] = steps(engine, seed, 10 * step, 2)  # the weights move on, the copy must not
    saver.finish()
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    told = ""
    try:
        saver.save(engine, 3, {})
        saver.finish()
    except UserErrors as caught:
        told = str(caught)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    left = sorted(path.name for path in root.iterdir())
    continued = {
        step: steps(engine_of(seed, "adamw", 2, step_directory(root, step)), seed, 10 * step, 2) for step in (1, 2)
    }
    saver.save(engine, 4, {})
    saver.finish()
    return {
        "undisturbed": list(undisturbed.values()),
        "continued": list(continued.values()),
        "told": told,
        "left": left,
        "parts": sorted(path.name for path in step_directory(root, 4).iterdir()),
        "pointers": Portable(step_directory(root, 4)).state["pointers"],
    }
